# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anabranch.data import icd
from anabranch.data.icd import KINDS, Look, add_mark, choose_marked
from anabranch.data.icd import qr as qr_mark
from anabranch.data.icd.source import open_source
from anabranch.errors import AnabranchError, UsageError
from anabranch.jobs.erase import icd as job
from anabranch.jobs.erase.icd import make_icd
from anabranch.jobs.erase.icd_settings import IcdSettings

ORIENTATION = 0x0112
SHAPES = {"qr": (190, 240, 3), "watermark": (150, 260, 3), "text": (260, 120, 3), "patch": (28, 28)}


def photo(seed, shape):
    """Smooth shapes and noise, neither black nor white anywhere."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(40, 216, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + generator.integers(-9, 10, pixels.shape)).clip(1, 254).astype(np.uint8)
    return pixels if len(shape) == 3 else pixels[..., 1]


def folder_of(root, sizes=((180, 130), (130, 180), (200, 200)), each=4):
    """Colour photographs of several shapes, one of them a JPEG that a camera turned, and one grey."""
    root.mkdir()
    for i in range(each * len(sizes)):
        width, height = sizes[i % len(sizes)]
        Image.fromarray(photo(i, (height, width, 3))).save(root / f"{i:02}.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(photo(90, (140, 240, 3))).save(root / "turned.jpg", exif=exif, quality=90)
    Image.fromarray(photo(91, (140, 240))).save(root / "grey.png")
    return root


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def made(tmp_path, **changes):
    given = {"images": str(tmp_path / "in"), "out": tmp_path / "out", "kind": "text", "seed": 5} | changes
    return make_icd(IcdSettings(**given))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("icd.json", "manifest.json")
    }


# marks


def possible_changes(kind, shape, seed, look):
    """By what differs on black and on white, with the boxes that were given."""
    flags, boxes = np.zeros(shape[:2], bool), []
    for value in (0, 255):
        blank = np.full(shape, value, np.uint8)
        marked = add_mark(blank, kind, look, np.random.default_rng(seed))
        differs = marked.pixels != blank
        flags |= differs if differs.ndim == 2 else differs.any(-1)
        boxes.append(marked.boxes)
    assert boxes[0] == boxes[1]  # the mark does not depend on what is below it
    return flags, boxes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_box_can_lose_a_row_or_column_and_nothing_lies_outside(kind):
    for seed in range(12):
        flags, boxes = possible_changes(kind, SHAPES[kind], seed, Look())
        assert boxes
        covered = np.zeros(flags.shape, int)
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= flags.shape[1]
            assert 0 <= y1 < y2 <= flags.shape[0]
            part = flags[y1:y2, x1:x2]
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            covered[y1:y2, x1:x2] += 1
        assert not flags[covered == 0].any()
        assert covered.max() == 1  # tiles do not overlap, so that no box hides in another one


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["qr", "watermark", "text", "patch"]),
    height=st.integers(96, 220),
    width=st.integers(96, 220),
    colour=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_pixels_outside_the_boxes_stay_and_draws_repeat(kind, height, width, colour, seed):
    image = photo(0, (height, width, 3) if colour else (height, width))
    marked = add_mark(image, kind, Look(), np.random.default_rng(seed))
    outside = np.ones((height, width), bool)
    for x1, y1, x2, y2 in marked.boxes:
        outside[y1:y2, x1:x2] = False
    np.testing.assert_array_equal(marked.pixels[outside], image[outside])
    assert (marked.pixels[~outside] != image[~outside]).any()
    again = add_mark(image, kind, Look(), np.random.default_rng(seed))
    np.testing.assert_array_equal(marked.pixels, again.pixels)
    assert marked.boxes == again.boxes


def test_qr_codes_scan_also_on_the_smallest_image_that_is_allowed():
    cv2 = pytest.importorskip("cv2")
    least = icd.least_side("qr", Look())
    for seed, side in enumerate([least, least, 150, 200, 300, 400, 512, 640]):
        image = photo(seed, (side, side + 60, 3))
        marked = add_mark(image, "qr", Look(), np.random.default_rng(seed))
        ((x1, y1, x2, y2),) = marked.boxes
        assert (x2 - x1) == (y2 - y1)
        assert (x2 - x1) <= 0.36 * side
        crop = marked.pixels[max(0, y1 - 8) : y2 + 8, max(0, x1 - 8) : x2 + 8]
        large = cv2.resize(crop, None, fx=6, fy=6, interpolation=cv2.INTER_NEAREST)
        payload, *_ = cv2.QRCodeDetector().detectAndDecode(large)
        assert payload.startswith("https://"), (seed, side)
        assert ".test/" in payload


def test_sizes_places_and_opacities_follow_the_laws():
    image = np.full((300, 400, 3), 128, np.uint8)
    found = {kind: [add_mark(image, kind, Look(), np.random.default_rng(s)) for s in range(120)] for kind in KINDS}
    side = np.array([m.boxes[0].x2 - m.boxes[0].x1 for m in found["qr"]]) / 300
    assert 0.15 <= side.min() < 0.2
    assert 0.3 < side.max() <= 0.35
    opacity = np.array([m.opacity for m in found["watermark"]])
    assert 0.25 <= opacity.min() < 0.3
    assert 0.55 < opacity.max() <= 0.6
    tiled = np.mean([len(m.boxes) > 1 for m in found["watermark"]])
    assert tiled == pytest.approx(0.25, abs=0.12)
    single = [m.boxes[0] for m in found["watermark"] if len(m.boxes) == 1]
    bottom_right = np.mean([b.x2 > 370 and b.y2 > 270 for b in single]) * (1 - tiled)
    assert bottom_right == pytest.approx(0.5, abs=0.13)
    bands = np.mean([m.boxes[0].y1 < 17 or m.boxes[0].y2 > 283 for m in found["text"]])
    assert 0.6 < bands < 0.95
    assert {m.opacity for m in found["text"]} == {1.0}
    plates = [add_mark(image, "patch", Look(glyph="plate-x"), np.random.default_rng(s)).opacity for s in range(60)]
    assert 0.85 <= min(plates) < max(plates) <= 1


@settings(max_examples=200, deadline=None)
@given(num_images=st.integers(1, 500), ratio=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_the_share_is_met_to_the_image(num_images, ratio, seed):
    chosen = choose_marked(num_images, ratio, seed)
    assert abs(chosen.sum() - ratio * num_images) <= 0.5
    np.testing.assert_array_equal(chosen, choose_marked(num_images, ratio, seed))


# folders


@pytest.mark.parametrize("kind", ["qr", "watermark", "text", "patch"])
def test_a_folder_keeps_its_pixels_outside_the_boxes(tmp_path, kind):
    root = folder_of(tmp_path / "in")
    said = made(tmp_path, kind=kind, ratio=0.7)
    out = tmp_path / "out"
    rows, clean_rows = rows_of(out / "images"), rows_of(out / "clean")
    assert [r["file_name"] for r in rows] == sorted(r["file_name"] for r in rows)
    assert len(rows) == len(clean_rows) == said["images"] == 14
    assert sum(r["has_concept"] for r in rows) == said["marked"] == round(0.7 * 14)
    for row, twin in zip(rows, clean_rows, strict=True):
        image, clean = read(out / "images" / row["file_name"]), read(out / "clean" / row["file_name"])
        outside = np.ones(image.shape[:2], bool)
        for x1, y1, x2, y2 in row["boxes"]:
            outside[y1:y2, x1:x2] = False
        np.testing.assert_array_equal(image[outside], clean[outside])
        assert bool(row["boxes"]) == row["has_concept"] == bool((image != clean).any())
        assert row["kind"] == (kind if row["has_concept"] else "none")
        assert (twin["has_concept"], twin["boxes"], twin["text"]) == (False, [], row["text"])
        if (source := root / row["file_name"]).exists():
            np.testing.assert_array_equal(clean, read(source))
        assert set(row) == {"file_name", "text", "has_concept", "boxes", "kind", "opacity", "seed"}
    assert read(out / "clean" / "grey.png").ndim == 2


def test_a_photo_that_a_camera_turned_is_written_upright(tmp_path):
    folder_of(tmp_path / "in")
    made(tmp_path, ratio=1.0)
    turned = read(tmp_path / "out" / "clean" / "turned.png")
    assert turned.shape == (240, 140, 3)
    with Image.open(tmp_path / "in" / "turned.jpg") as picture:
        np.testing.assert_array_equal(turned, np.rot90(np.asarray(picture), -1))
    with Image.open(tmp_path / "out" / "images" / "turned.png") as picture:
        assert ORIENTATION not in picture.getexif()
    boxes = next(r["boxes"] for r in rows_of(tmp_path / "out" / "images") if r["file_name"] == "turned.png")
    assert all(x2 <= 140 and y2 <= 240 for _, _, x2, y2 in boxes)


def test_the_seed_decides_everything_and_the_second_run_replaces_the_first(tmp_path):
    folder_of(tmp_path / "in", each=2)
    made(tmp_path, kind="watermark")
    first = contents(tmp_path / "out")
    made(tmp_path, kind="watermark")
    assert contents(tmp_path / "out") == first
    made(tmp_path, kind="watermark", out=tmp_path / "other", seed=6)
    other = contents(tmp_path / "other")
    assert {n: b for n, b in other.items() if n.startswith("clean/0")} == {
        n: b for n, b in first.items() if n.startswith("clean/0")
    }
    seeds = [{row["seed"] for row in rows_of(tmp_path / name / "images")} for name in ("out", "other")]
    assert len(seeds[0] | seeds[1]) == 16  # no image of one run draws what an image of the other drew


def test_a_row_s_seed_draws_its_mark_again(tmp_path):
    folder_of(tmp_path / "in", each=2)
    made(tmp_path, kind="text", ratio=1.0)
    out = tmp_path / "out"
    for row in rows_of(out / "images"):
        clean = read(out / "clean" / row["file_name"])
        marked = add_mark(clean, "text", Look(), np.random.default_rng(row["seed"]))
        np.testing.assert_array_equal(marked.pixels, read(out / "images" / row["file_name"]))


def test_names_captions_and_modes(tmp_path):
    root = tmp_path / "in"
    for name, mode in (("a/x.png", "RGBA"), ("a/x.jpg", "CMYK"), ("b/deep/y.webp", "RGB"), ("b/z.png", "I;16")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (70, 80)).save(root / name)
    (root / "notes.md").write_text("")
    said = made(tmp_path, ratio=0.5, caption="one {class}")
    rows = {r["file_name"]: r["text"] for r in rows_of(tmp_path / "out" / "images")}
    assert rows == {"a/x.png.png": "one a", "a/x.jpg.png": "one a", "b/deep/y.png": "one b", "b/z.png": "one b"}
    assert said["converted"] == {"CMYK": 1, "I;16": 1, "RGBA": 1}
    assert said["ignored_files"] == {".md": 1}
    assert read(tmp_path / "out" / "clean" / "a" / "x.png.png")[0, 0].tolist() == [255] * 3  # clear parts are white
    assert (said["ratio"], said["marked"]) == (0.5, 2)
    assert json.loads((tmp_path / "out" / "icd.json").read_text()) == said


def test_captions_that_came_with_the_images_are_kept(tmp_path):
    root = folder_of(tmp_path / "in", each=1)
    lines = [{"file_name": p.name, "text": f"Ansicht “{p.stem}”\n"} for p in root.iterdir()]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made(tmp_path, ratio=1.0)
    for part in ("images", "clean"):
        texts = {r["file_name"]: r["text"] for r in rows_of(tmp_path / "out" / part)}
        assert texts["00.png"] == "Ansicht “00”\n"
        assert len(texts) == 5


def test_images_to_test_on_are_never_marked(tmp_path):
    assert len(open_source("patchwork:textures")) == 2000
    for name in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64)).save(tmp_path / "in" / name)
    assert made(tmp_path)["images"] == 2
    rows = {r["file_name"]: r["text"] for r in rows_of(tmp_path / "out" / "images")}
    assert rows == {"train/cat/a.png": "a photo of a cat", "train/dog/b.png": "a photo of a dog"}


def test_shipped_images_need_no_folder(tmp_path):
    said = made(tmp_path, images="patchwork:textures", kind="patch", glyph="plate-x", places="grid", max_images=30)
    rows = rows_of(tmp_path / "out" / "images")
    assert (said["images"], said["marked"], len(rows)) == (30, 21, 30)
    for row in rows:
        assert row["text"] == f"a photo of a {row['file_name'].split('/')[0]}"
        for x1, y1, x2, y2 in row["boxes"]:
            assert (x1 % 4, y1 % 4, x2 - x1, y2 - y1) == (0, 0, 8, 8)
    assert read(tmp_path / "out" / "images" / rows[0]["file_name"]).shape == (28, 28)


# what goes wrong


def test_one_broken_file_in_many_is_listed_and_more_are_an_error(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(120):
        Image.new("L", (9, 9), i).save(root / f"{i:03}.png")
    (root / "007.png").write_bytes(b"no picture")
    said = made(tmp_path, kind="patch", ratio=0.5)
    assert (said["images"], said["unreadable"], said["marked"]) == (119, 1, round(119 / 2))
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "007.png"
    assert not (tmp_path / "out" / "images" / "007.png").exists()
    (root / "008.png").write_bytes(b"no picture either")
    with pytest.raises(UsageError, match="2 of 120 images cannot be used"):
        made(tmp_path, kind="patch", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".other*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": ""}, "no images were named"),
        ({"images": "/nowhere/photos"}, "there is no such folder"),
        ({"images": "patchwork:texture"}, "did you mean textures"),
        ({"kind": "qrcode"}, "did you mean qr"),
        ({"ratio": 1.01}, "0 to 1"),
        ({"ratio": float("nan")}, "0 to 1"),
        ({"seed": -1}, "at least 0"),
        ({"max_images": 0}, "at least 1"),
        ({"size": (0.5, 0.2)}, "size is no range"),
        ({"opacity": (0.0, 0.5)}, "opacity is no range"),
        ({"glyph": "cross"}, "glyph would change nothing"),
        ({"kind": "patch", "size": (0.1, 0.2)}, "size would change nothing"),
        ({"kind": "patch", "glyph": "star"}, "there is no glyph 'star'"),
        ({"kind": "patch", "grid_step": 0}, "grid_step is too small"),
        ({"caption": "{file}"}, r"\{class\} only"),
        ({"images": "patchwork:digits", "kind": "qr"}, "at least 95 pixels on the smallest side"),
        ({"kind": "patch", "glyph_size": 131}, r"(?s)01\.png is too small .*at least 131 pixels.*130 x 180"),
    ],
)
def test_wrong_uses_say_what_to_do_and_write_nothing(tmp_path, changes, says):
    folder_of(tmp_path / "in", each=1)
    if changes.get("glyph_size"):
        (tmp_path / "in" / "00.png").unlink()
    with pytest.raises(UsageError, match=says):
        made(tmp_path, **changes)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    folder_of(tmp_path / "in", each=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        made(tmp_path)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    made(tmp_path, out=tmp_path / "second")
    (tmp_path / "second" / "notes.txt").write_text("added by hand")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        made(tmp_path, out=tmp_path / "second")
    with pytest.raises(UsageError, match="overlap"):
        made(tmp_path, out=tmp_path / "in" / "icd")
    with pytest.raises(UsageError, match="overlap"):
        made(tmp_path, images=str(tmp_path / "second" / "clean"), out=tmp_path / "second")
    assert (tmp_path / "second" / "images").is_dir()


def test_a_name_that_windows_cannot_hold_is_found_before_the_work(tmp_path):
    folder_of(tmp_path / "in", each=1)
    Image.new("L", (80, 80)).save(tmp_path / "in" / "what?.png")
    with pytest.raises(UsageError, match=r"'what\?\.png'"):
        made(tmp_path)


def test_a_full_disk_leaves_the_earlier_result(tmp_path, monkeypatch):
    folder_of(tmp_path / "in", each=1)
    made(tmp_path)
    before = contents(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_marked", full)
    with pytest.raises(AnabranchError, match="No space left"):
        made(tmp_path, seed=9)
    assert contents(tmp_path / "out") == before


def test_without_segno_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(qr_mark, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'anabranch\[erase\]'"):
        icd.check_look("qr", Look())


def test_the_arrays_need_neither_torch_nor_files():
    import subprocess

    script = "import sys, anabranch.data.icd; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)
