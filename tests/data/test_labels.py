# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from anabranch.data.labels import Label, read_labels, refuse_changed, write_labels
from anabranch.errors import AnabranchError, UsageError

DETECTOR = {"name": "qr", "version": "opencv 5", "threshold": 0.5}


@pytest.fixture
def scanned(tmp_path):
    """(labels.jsonl, its rows) of two images, one in a folder and turned by its camera."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (50, 20)).save(root / "deep" / "two.jpg", exif=exif)
    rows = (
        Label("one.png", 40, 30, ((0.5, 0.0, 40.0, 12.25),), 0.9, True, scores=(0.9,)),
        Label("deep/two.jpg", 20, 50, (), 0.1, False, second_score=0.7, second_has_concept=True),
    )
    path = tmp_path / "labels.jsonl"
    write_labels(path, rows, {"images": str(root), "concept": "QR code", "detector": DETECTOR})
    return path, rows


def edit(path, line, **changes):
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | changes)
    path.write_text("\n".join(lines) + "\n")


def test_what_is_written_is_read(scanned):
    path, rows = scanned
    labels = read_labels(path)
    assert labels.rows == rows
    assert (labels.detector, labels.version, labels.threshold) == ("qr", "opencv 5", 0.5)
    assert (labels.concept, labels.root) == ("QR code", path.parent / "images")
    assert {p.name for p in path.parent.iterdir()} == {"images", "labels.jsonl", "labels.json"}


def test_a_moved_folder(scanned):
    path, rows = scanned
    shutil.move(path.parent / "images", path.parent / "elsewhere")
    with pytest.raises(UsageError, match="the folder of its images is gone"):
        read_labels(path)
    assert read_labels(path, path.parent / "elsewhere").rows == rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"boxes": [[0, 0, 41, 10]]}, "a box outside the image"),
        ({"boxes": [[-1, 0, 4, 10]]}, "inside 0, 0, 40, 30"),
        ({"boxes": [[20, 5, 10, 10]]}, "this looks like xywh"),
        ({"boxes": [[20, 5, 20, 10]]}, "empty or reversed box"),
        ({"boxes": [[float("nan"), 5, 20, 10]]}, "not four finite numbers"),
        ({"boxes": [[1, 5, 20]]}, "not four finite numbers"),
        ({"boxes": "none"}, "not a label"),
        ({"score": float("inf")}, "the score is not a finite number"),
        ({"width": "wide"}, "not a label"),
        ({"has_concept": "no"}, "has_concept is neither true nor false"),
        ({"has_concept": False}, "boxes of a concept that the image does not have"),
        ({"file": "../one.png"}, "unsafe file name"),
        ({"file": "/etc/passwd"}, "unsafe file name"),
        ({"file": "deep\\two.jpg"}, "unsafe file name"),
        ({"file": "a//b.png"}, "unsafe file name"),
        ({"file": ""}, "unsafe file name"),
        ({"file": "three.png"}, "'three.png' is missing"),
        ({"width": 80}, "is 40 x 30 pixels, the label says 80 x 30"),
        ({"width": 30, "height": 40, "boxes": []}, "is 40 x 30 pixels"),
    ],
)
def test_a_wrong_line_is_named(scanned, changes, says):
    path, _ = scanned
    edit(path, 1, **changes)
    with pytest.raises(AnabranchError, match="line 1") as error:
        read_labels(path)
    assert says in str(error.value)


def test_an_image_counts_as_turned_by_its_camera(scanned):
    path, _ = scanned
    edit(path, 2, width=50, height=20)
    with pytest.raises(AnabranchError, match=r"line 2: 'deep/two\.jpg' is 20 x 50 pixels"):
        read_labels(path)


def test_a_file_listed_twice_and_lines_that_are_no_json(scanned):
    path, _ = scanned
    text = path.read_text()
    path.write_text(text + "\n" + text.splitlines()[0])
    with pytest.raises(AnabranchError, match=r"line 4: 'one\.png' is listed twice"):
        read_labels(path)
    path.write_text(text + "{")
    with pytest.raises(AnabranchError, match="line 3: not a label"):
        read_labels(path)
    path.write_text("")
    with pytest.raises(UsageError, match="holds no images"):
        read_labels(path)


def test_broken_and_exchanged_images(scanned):
    path, _ = scanned
    labels = read_labels(path)
    one = path.parent / "images" / "one.png"
    with_hash = replace(labels, rows=(replace(labels.rows[0], sha256="0" * 64), labels.rows[1]))
    refuse_changed(labels)
    with pytest.raises(AnabranchError, match=r"1 images changed since they were scanned, the first is 'one\.png'"):
        refuse_changed(with_hash)
    one.write_bytes(b"broken")
    with pytest.raises(AnabranchError, match=r"line 1: 'one\.png' not a PNG"):
        read_labels(path)


def test_lines_that_nobody_vouches_for(scanned, tmp_path):
    path, rows = scanned
    (path.parent / "labels.json").unlink()
    with pytest.raises(UsageError, match="scan the images again"):
        read_labels(path)
    with pytest.raises(UsageError, match="would be lost"):
        write_labels(path, rows, {})
    with pytest.raises(UsageError, match="no such file"):
        read_labels(tmp_path / "nowhere.jsonl")


def test_only_labels_of_an_earlier_scan_are_replaced(scanned, tmp_path):
    path, rows = scanned
    header = {"images": str(path.parent / "images"), "concept": "", "detector": DETECTOR}
    write_labels(path, rows[:1], header)
    assert read_labels(path).rows == rows[:1]
    other = tmp_path / "notes.jsonl"
    other.write_text("mine")
    with pytest.raises(UsageError, match="would be lost"):
        write_labels(other, rows, header)
    assert other.read_text() == "mine"
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UsageError, match=r"data\.json would be lost"):
        write_labels(tmp_path / "data.jsonl", rows, header)
    with pytest.raises(UsageError, match=r"ends in \.jsonl"):
        write_labels(tmp_path / "labels.txt", rows, header)


def test_a_write_that_fails_leaves_the_old_labels(scanned, monkeypatch):
    path, rows = scanned
    header = {"images": str(path.parent / "images"), "concept": "", "detector": DETECTOR}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AnabranchError, match="No space left"):
        write_labels(path, rows[:1], header)
    assert read_labels(path).rows == rows
    assert {p.name for p in path.parent.iterdir()} == {"images", "labels.jsonl", "labels.json"}


def test_labels_that_could_not_be_read_are_not_written(tmp_path):
    rows = (Label("x.png", 10, 10, ((0.0, 0.0, 11.0, 5.0),), 1.0, True),)
    with pytest.raises(AnabranchError, match="a box outside the image"):
        write_labels(tmp_path / "labels.jsonl", rows, {})
    assert not list(tmp_path.iterdir())
    assert np.isfinite(rows[0].score)
