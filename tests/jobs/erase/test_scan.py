# SPDX-License-Identifier: Apache-2.0
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from anabranch.data.images import UnreadableImages, open_images
from anabranch.data.labels import read_labels, refuse_changed
from anabranch.errors import UsageError
from anabranch.jobs.erase import scan as job
from anabranch.jobs.erase.scan import answers, batches, scan
from anabranch.jobs.erase.scan_settings import ScanSettings
from anabranch.suppress.detectors.template import TemplateDetector

GLYPH = np.kron([[1, 0, 1], [0, 1, 1], [1, 1, 0]], np.ones((3, 3))).astype(np.uint8) * 255
MARKED = 70


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """100 garments of which 70 carry a planted glyph, their clean twins, and the truth."""
    root = tmp_path_factory.mktemp("world")
    images = open_images("patchwork:garments")
    pixels = images.store.read(torch.arange(0, 2000, 20))[:, 0].numpy()
    generator = np.random.default_rng(0)
    for name in ("images/deep", "clean"):
        (root / name).mkdir(parents=True)
    rows = []
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / "clean" / f"{i:03}.png")
        file, boxes, image = f"deep/{i:03}.png", [], image.copy()
        if i < MARKED:
            x, y = generator.integers(0, 20, 2).tolist()
            image[y : y + 9, x : x + 9] = GLYPH
            boxes = [[x, y, x + 9, y + 9]]
        Image.fromarray(image).save(root / "images" / file)
        rows.append({"file_name": file, "has_concept": bool(boxes), "boxes": boxes})
    (root / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.fromarray(GLYPH).save(root / "glyph.png")
    return root


def settings_of(world, tmp_path, **changes):
    given = {"images": world / "images", "detector": f"template:{world / 'glyph.png'}", "out": tmp_path / "l.jsonl"}
    return ScanSettings(**(given | changes))


def test_what_a_scan_finds_writes_and_says(world, tmp_path, capsys):
    settings = settings_of(
        world,
        tmp_path,
        known=world / "images" / "metadata.jsonl",
        second_detector=f"boxes:{world / 'images' / 'metadata.jsonl'}",
        concept="glyph",
    )
    found = scan(settings)
    labels = read_labels(settings.out)
    refuse_changed(labels)
    assert labels.concept == "glyph"
    assert len(labels.rows) == 100
    truth = {row["file_name"]: row for row in map(json.loads, settings.known.read_text().splitlines())}
    assert [row.has_concept for row in labels.rows] == [truth[row.file]["has_concept"] for row in labels.rows]
    assert all(list(map(list, row.boxes)) == truth[row.file]["boxes"] for row in labels.rows)
    assert (found.trust.recall.rate, found.trust.false_alarms.count, found.trust.mean_iou) == (1, 30, 1)
    assert found.trust.agreement.kappa == 1
    header = json.loads(settings.out.with_suffix(".json").read_text())
    assert header["counts"] == {"images": 100, "containing": 70, "boxes": 70, "unreadable": 0}
    assert header["recall"]["low"] == pytest.approx(0.948, abs=1e-3)
    assert header["false_positive_rate_on"] == "the images known to be clean"
    said = capsys.readouterr().out
    for line in (
        "contain it     70.0 % [60.4, 78.1], n = 100",
        "recall         100.0 %",
        "mean IoU 1.00",
        "kappa 1.00",
    ):
        assert line in said
    assert "images a second" in said


def test_false_alarms_are_measured_on_clean_images_or_said_not_to_be(world, tmp_path, capsys):
    truth = f"boxes:{world / 'images' / 'metadata.jsonl'}"
    settings = settings_of(world, tmp_path, clean=world / "clean", threshold=0.2, batch_size=7, second_detector=truth)
    found = scan(settings)
    assert found.trust.second_false_alarms is None  # it knows names, and a clean twin has the same
    flagged = sum(contains_in(world / "clean", settings))
    assert found.trust.false_alarms.hits == flagged > 0
    assert "n = 100 of the clean images" in capsys.readouterr().out
    scan(settings_of(world, tmp_path))
    assert "false alarms   not measured: give --clean" in capsys.readouterr().out
    assert json.loads(settings.out.with_suffix(".json").read_text())["false_positive_rate"] is None


def contains_in(folder, settings):
    detector = TemplateDetector(settings.images.parent / "glyph.png", settings.threshold)
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            (found,) = detector.detect([np.asarray(picture.convert("RGB"))])
        yield max(d.score for d in found) > settings.threshold


def test_nothing_found_and_everything_found(world, tmp_path, capsys):
    found = scan(settings_of(world, tmp_path, images=world / "clean", threshold=0.95))
    said = capsys.readouterr().out
    highest = max(row.score for row in found.scanned.rows)
    assert f"nothing to erase at threshold 0.95; the highest score was {highest:.3f}" in said
    scan(settings_of(world, tmp_path, threshold=0.0))
    assert "warning: every image contains it" in capsys.readouterr().out


def test_unreadable_images_are_counted_and_too_many_are_an_error(tmp_path, world, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(200):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i:03}.png")
    (folder / "050.png").write_bytes(b"broken")
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    (folder / "notes.txt").write_text("")
    found = scan(settings_of(world, tmp_path, images=folder))
    said = capsys.readouterr().out
    assert "unreadable     1: '050.png' (not a PNG, JPEG or WebP picture)" in said
    assert "converted      to 8-bit colour: 1 CMYK" in said
    assert "not images     1 .txt" in said
    assert len(found.scanned.rows) == 200
    before = (tmp_path / "l.jsonl").read_bytes()
    for i in range(5):
        (folder / f"{i:03}.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImages, match="6 of 201 images cannot be used"):
        scan(settings_of(world, tmp_path, images=folder))
    assert (tmp_path / "l.jsonl").read_bytes() == before


def test_wrong_uses_start_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "look_through", None)
    (tmp_path / "l.jsonl").write_text("mine")
    for changes, says in [
        ({"images": None}, "--images is missing"),
        ({"detector": ""}, "--detector is missing"),
        ({"batch_size": 0}, "at least 1"),
        ({}, "would be lost"),
        ({"out": tmp_path / "new.jsonl", "images": world / "imges"}, "did you mean images?"),
        ({"out": tmp_path / "new.jsonl", "clean": world / "glyph"}, "there is no such folder"),
        ({"out": tmp_path / "new.jsonl", "known": world / "x.jsonl"}, "metadata.jsonl with has_concept"),
        ({"out": tmp_path / "new.jsonl", "images": world, "known": world / "images" / "metadata.jsonl"}, "names none"),
        ({"out": tmp_path / "new.jsonl", "second_detector": f"template:{world / 'glyph.png'}"}, "both detectors are"),
        (
            {"out": tmp_path / "new.jsonl", "clean": world / "clean", "detector": f"masks:{world / 'clean'}"},
            "knows nothing of the clean images",
        ),
    ]:
        with pytest.raises(UsageError) as error:
            scan(settings_of(world, tmp_path, **changes))
        assert says in str(error.value), changes
    assert not (tmp_path / "new.jsonl").exists()
    assert (tmp_path / "l.jsonl").read_text() == "mine"


def test_the_same_scan_twice_is_the_same_file(world, tmp_path):
    settings = settings_of(world, tmp_path)
    scan(settings)
    before = [settings.out.read_bytes(), settings.out.with_suffix(".json").read_bytes()]
    scan(ScanSettings(**(vars(settings) | {"batch_size": 3})))
    assert [settings.out.read_bytes(), settings.out.with_suffix(".json").read_bytes()] == before


def test_batches_lose_nothing():
    assert list(batches(iter("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(batches(iter(""), 3)) == []
    assert answers(None, []) == []


class Slow:
    name, version, threshold = "slow", "1", 0.5

    def detect(self, images, files=None):
        time.sleep(0.004 * len(images))
        return [[] for _ in images]


def test_a_scan_takes_little_longer_than_its_detector(world):
    scanned = job.look_through(job.listed(world / "images"), Slow(), None, 8, "images")
    assert scanned.seconds < 1.5 * scanned.detector_seconds  # 1.02 where nothing else runs
