# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import random
import tempfile

import pytest
import torch
from PIL import Image

from anabranch.data import folders, images
from anabranch.data.images import UnreadableImages, open_images, write_quarantine
from anabranch.errors import AnabranchError, UsageError


def paint(path, value=0, size=(8, 8), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def task(root, classes=("cat", "dog"), each=3, parts=("",)):
    for part in parts:
        for label, name in enumerate(classes):
            for i in range(each):
                paint(root / part / name / f"{i}.png", 10 * label + i)
    return root


# layouts


def test_any_nesting_is_read_in_a_stable_order(tmp_path):
    for value, name in enumerate(["b/deep/er/x.png", "a.PNG", "b/y.jpeg", "c/z.webp"]):
        paint(tmp_path / name, value * 60)
    source = open_images(tmp_path)
    assert source.files == ("a.PNG", "b/deep/er/x.png", "b/y.jpeg", "c/z.webp")
    assert (source.name, source.labels, source.is_test) == (tmp_path.name, None, None)
    means = source.store.read(torch.tensor([3, 0])).float().mean((1, 2, 3))
    assert means.tolist() == pytest.approx([180, 60], abs=2)


def test_classes_are_folders_and_labels_follow_their_names(tmp_path):
    pets = open_images(task(tmp_path), labelled=True)
    assert pets.class_names == ("cat", "dog")
    assert pets.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert pets.is_test is None
    assert pets.store.read(torch.arange(6))[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_a_split_folder_gives_is_test_and_as_a_source_its_training_part_only(tmp_path, test_name):
    task(tmp_path, parts=("train", test_name))
    pets = open_images(tmp_path, labelled=True)
    assert pets.class_names == ("cat", "dog")
    assert [f.startswith(test_name) for f in pets.files] == pets.is_test.tolist()
    assert pets.is_test.sum() == 6
    source = open_images(tmp_path)
    assert len(source) == 6
    assert all(f.startswith("train/") for f in source.files)
    assert source.name.endswith("/train")


def test_test_wins_over_val_and_a_class_called_train_is_a_class(tmp_path):
    task(tmp_path / "a", parts=("train", "val", "test"))
    split = open_images(tmp_path / "a", labelled=True)
    assert {f.split("/")[0] for f in split.files} == {"train", "test"}
    vehicles = open_images(task(tmp_path / "b", classes=("car", "train")), labelled=True)
    assert vehicles.class_names == ("car", "train")


def test_a_labelled_folder_is_also_a_source(tmp_path):
    assert len(open_images(task(tmp_path))) == 6


# size and channels


def test_auto_size_keeps_small_equal_squares_and_takes_224_otherwise(tmp_path):
    paint(tmp_path / "a" / "0.png", size=(12, 12))
    assert open_images(tmp_path / "a").image_size == 12
    paint(tmp_path / "a" / "1.png", size=(12, 13))
    assert open_images(tmp_path / "a").image_size == 224
    paint(tmp_path / "b" / "0.png", size=(65, 65))
    assert open_images(tmp_path / "b").image_size == 224
    assert open_images(tmp_path / "b", image_size=20).image_size == 20


def test_auto_channels_is_one_only_where_every_image_is_grey(tmp_path):
    paint(tmp_path / "0.png", 7)
    paint(tmp_path / "1.png", (50, 50, 50), mode="RGB")  # saved in colour, yet grey
    grey = open_images(tmp_path)
    assert grey.channels == 1
    assert grey.store.read(torch.arange(2))[:, 0, 0, 0].tolist() == [7, 50]
    paint(tmp_path / "2.png", (50, 51, 50), mode="RGB")
    assert open_images(tmp_path).channels == 3
    assert open_images(tmp_path, channels=1).channels == 1


@pytest.mark.parametrize(("wrong", "message"), [({"channels": 2}, "channels"), ({"image_size": 0}, "image_size")])
def test_wrong_shape_requests_say_what_is_possible(tmp_path, wrong, message):
    with pytest.raises(UsageError, match=message):
        open_images(tmp_path, **wrong)


# accounting


def test_every_file_is_read_refused_or_counted(tmp_path):
    task(tmp_path)
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "dog" / "scan.tif").touch()
    (tmp_path / "dog" / "README").touch()
    (tmp_path / ".DS_Store").touch()
    paint(tmp_path / ".cache" / "thumb.png")
    paint(tmp_path / "cat" / "._0.png")
    pets = open_images(tmp_path, labelled=True)
    assert len(pets) == 6
    assert pets.ignored == {".tif": 1, ".txt": 1, "hidden": 3, "no extension": 1}


def test_broken_files_are_quarantined_with_reason_and_digest(tmp_path):
    for i in range(200):
        paint(tmp_path / f"{i:03}.png", i)
    whole = paint(tmp_path / "whole.jpg", size=(64, 64)).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "100.png").write_bytes(b"not a picture")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    source = open_images(tmp_path, image_size=8, channels=1)
    assert [bad.path for bad in source.quarantine] == ["100.png", "cut.jpg"]
    assert source.quarantine[0].reason == "not a PNG, JPEG or WebP picture"
    assert source.quarantine[0].sha256 == hashlib.sha256(b"not a picture").hexdigest()
    assert len(source) == 199
    # the images behind a broken one must not move
    assert source.files[100] == "101.png"
    assert source.store.read(torch.tensor([99, 100]))[:, 0, 0, 0].tolist() == [99, 101]
    write_quarantine(tmp_path / "bad.jsonl", source.quarantine)
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"path", "reason", "sha256"}] * 2


def test_more_than_one_percent_bad_stops_with_count_and_names(tmp_path):
    for i in range(100):
        paint(tmp_path / f"{i:03}.png", i)
    (tmp_path / "005.png").write_bytes(b"")
    assert len(open_images(tmp_path)) == 99  # exactly 1 % passes
    (tmp_path / "007.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(
        UnreadableImages, match=r"2 of 100 images cannot be used\n.*at most 1%\n.*'005.png'.*'007.png'"
    ) as e:
        open_images(tmp_path)
    assert len(e.value.bad) == 2


def test_a_bomb_and_fuzzed_files_in_a_folder_end_in_the_quarantine(tmp_path):
    from_png = paint(tmp_path / "seed.png", size=(24, 24)).read_bytes()
    generator = random.Random(1)
    for i in range(300):
        data = bytearray(from_png)
        for _ in range(3):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (tmp_path / f"{i}.png").write_bytes(data)
    with pytest.raises(UnreadableImages) as e:
        open_images(tmp_path)
    assert len(e.value.bad) > 100


# unsafe entries


def test_links_pipes_and_devices_are_refused_and_never_opened(tmp_path):
    outside = paint(tmp_path / "outside" / "secret.png")
    root = tmp_path / "root"
    for i in range(600):
        (root / "many").mkdir(parents=True, exist_ok=True)
        (root / "many" / f"{i}.png").write_bytes(outside.read_bytes())
    (root / "escape.png").symlink_to(outside)
    (root / "dotdot.png").symlink_to("../outside/secret.png")
    (root / "inside.png").symlink_to("many/1.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    listing = folders.list_folder(root)
    assert {bad.path: bad.reason.split(":")[0] for bad in listing.refused} == {
        "broken.png": "cannot be opened",
        "dotdot.png": "a link that leads out of the folder",
        "escape.png": "a link that leads out of the folder",
        "folder": "a link to a folder; only folders themselves are read",
        "loop.png": "cannot be opened",
        "pipe.png": "a pipe, device or folder, not a file",
        "zero.png": "a link that leads out of the folder",
    }
    assert len(listing.files) == 601
    with pytest.raises(UnreadableImages, match="7 of 608"):
        open_images(root)
    for name in ("broken.png", "dotdot.png"):
        (root / name).unlink()
    assert len(open_images(root).quarantine) == 5


def test_a_folder_given_through_a_link_is_fine(tmp_path):
    task(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(open_images(tmp_path / "link")) == 6


# wrong folders


def test_missing_folder_suggests_a_neighbour(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"there is no such folder\n(.*\n)*.*did you mean photos"):
        open_images(tmp_path / "photo")


def test_a_file_is_not_a_folder(tmp_path):
    with pytest.raises(UsageError, match="this is a file"):
        open_images(paint(tmp_path / "a.png"))


def test_empty_folder_says_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(UsageError, match=r"no images(.*\n)*.*\.jpeg, \.jpg, \.png, \.webp(.*\n)*.*received: nothing"):
        open_images(tmp_path)
    for name in ("a.tif", "b.tif", "c.zip"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"received: 2 \.tif, 1 \.zip"):
        open_images(tmp_path)


def test_one_class_points_inside(tmp_path):
    task(tmp_path / "train")
    with pytest.raises(UsageError, match=r"only one class, 'train'(.*\n)*.*try: .*give .*/train"):
        open_images(tmp_path, labelled=True)


def test_images_outside_class_folders_are_named(tmp_path):
    paint(task(tmp_path) / "lost.png")
    with pytest.raises(UsageError, match=r"1 images lie in no class folder, the first is 'lost.png'"):
        open_images(tmp_path, labelled=True)


def test_small_and_empty_classes_are_named(tmp_path):
    task(tmp_path)
    paint(tmp_path / "fox" / "only.png")
    (tmp_path / "owl").mkdir()
    (tmp_path / "yak").symlink_to(tmp_path / "cat")
    with pytest.raises(UsageError, match=r"3 of 5 classes(.*\n)*.*'fox' has 1, 'owl' has 0, 'yak' has 0"):
        open_images(tmp_path, labelled=True)


def test_a_class_that_only_the_test_part_has_is_named(tmp_path):
    task(tmp_path, parts=("train", "test"))
    paint(tmp_path / "test" / "fox" / "0.png")
    with pytest.raises(UsageError, match="'fox' has 0"):
        open_images(tmp_path, labelled=True)


def test_a_class_that_shrinks_to_one_readable_image_is_named(tmp_path):
    task(tmp_path, each=150)
    paint(tmp_path / "fox" / "0.png")
    (tmp_path / "fox" / "1.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match="'fox' has 1"):
        open_images(tmp_path, labelled=True)


# scale


def test_progress_reaches_the_total_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "CHUNK", 4)
    calls = []
    open_images(task(tmp_path, each=5), image_size=8, channels=1, progress=lambda *at: calls.append(at))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_above_the_memory_limit_pixels_lie_in_a_file_that_leaves_nothing_behind(tmp_path, monkeypatch):
    in_memory = open_images(task(tmp_path / "pets"), image_size=8, channels=3)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 100)
    opened, temporary_file = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: opened.append(where) or temporary_file(**where))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = open_images(tmp_path / "pets", image_size=8, channels=3)
    assert opened == [{"dir": tmp_path}]
    assert [p.name for p in tmp_path.iterdir()] == ["pets"]
    rows = torch.tensor([5, 0, 3])
    assert torch.equal(mapped.store.read(rows), in_memory.store.read(rows))


def test_a_full_disk_is_said_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MEMORY_LIMIT", 100)
    task(tmp_path)
    with pytest.raises(AnabranchError, match="not enough disk space"):
        images.allocate((2**20, 3, 4096, 4096))


def test_cache_is_reused_until_a_file_changes(tmp_path, monkeypatch):
    root, cache = task(tmp_path / "pets", each=100), tmp_path / "cache"
    (root / "cat" / "3.png").write_bytes(b"broken")
    first = open_images(root, cache=cache)
    monkeypatch.setattr(folders, "decode", None)  # a second decoding would fail
    again = open_images(root, cache=cache)
    assert torch.equal(first.store.read(torch.arange(199)), again.store.read(torch.arange(199)))
    assert (again.quarantine, again.files) == (first.quarantine, first.files)
    monkeypatch.undo()
    paint(root / "dog" / "99.png", 255, size=(8, 8))
    os.utime(root / "dog" / "99.png", ns=(0, 0))
    changed = open_images(root, cache=cache)
    assert changed.store.read(torch.tensor([198]))[0, 0, 0, 0] == 255
    assert not list(cache.glob("*.unfinished"))


def test_an_unfinished_cache_is_ignored(tmp_path):
    root, cache = task(tmp_path / "pets"), tmp_path / "cache"
    whole = open_images(root, cache=cache)
    (facts,) = cache.glob("*.json")
    facts.write_text('{"all_gr')
    assert torch.equal(open_images(root, cache=cache).store.read(torch.arange(6)), whole.store.read(torch.arange(6)))
    facts.unlink()
    (pixels,) = cache.glob("*.pixels")
    pixels.write_bytes(b"")
    assert torch.equal(open_images(root, cache=cache).store.read(torch.arange(6)), whole.store.read(torch.arange(6)))
