# SPDX-License-Identifier: Apache-2.0
"""Boxes or masks that somebody else made, looked up by the name of the image.

Paper     : none; any other detector, run elsewhere, or a person with a labelling tool.
Equation  : JSONL x1, y1, x2, y2; COCO x, y, w, h -> x, y, x + w, y + h; YOLO (cx -+ w/2) * W, (cy -+ h/2) * H;
            mask: the boxes of the 4-connected components of what is brighter than 127.
Shapes    : names relative to the folder of images, with forward slashes; images (H, W, 3) uint8.
Differs   : an image that a JSONL or COCO file does not list is an error; a missing YOLO file or mask means that the
            image is clean, as those formats have it. Boxes without a score have score 1.
Check     : one set of boxes written in all four ways comes back as one (tests/suppress/detectors/test_on_disk.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from anabranch.data.decode import UNREADABLE, open_picture
from anabranch.data.folders import refusal
from anabranch.errors import AnabranchError, UsageError, did_you_mean
from anabranch.suppress.detectors.overlap import component_boxes
from anabranch.suppress.detectors.protocol import Detection

LookUp = Callable[[str, int, int], list[Detection]]
"""(file, width, height) -> the candidates of that image."""
WHITE = 127


@dataclass(frozen=True)
class Entry:
    """What a line says of one image."""

    has_concept: bool
    boxes: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]


class BoxesOnDisk:
    def __init__(self, path: Path, concept: str = "", threshold: float = 0.5):
        self.name, self.threshold = f"boxes:{path.name}", threshold
        if path.is_dir():
            self.look_up, self.version = yolo(path, concept), f"{len(list(path.rglob('*.txt')))} files"
            return
        if not path.is_file():
            raise UsageError(f"{path} cannot be read", expected="a .jsonl or .json file, or a folder of .txt files")
        self.look_up = listed(read_jsonl(path), path) if path.suffix == ".jsonl" else coco(path, concept)
        self.version = f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        names = named(self.name, files)
        return [self.look_up(file, i.shape[1], i.shape[0]) for file, i in zip(names, images, strict=True)]


class MasksOnDisk:
    def __init__(self, folder: Path, threshold: float = 0.5):
        self.folder, self.name, self.threshold = folder, f"masks:{folder.name}", threshold
        count = len(list(folder.rglob("*.png"))) if folder.is_dir() else 0
        if not count:
            raise UsageError(f"{folder}: no masks", expected="a folder of PNG files named after the images")
        self.version = f"{count} files"

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        names = named(self.name, files)
        return [self._detect(file, i.shape[1], i.shape[0]) for file, i in zip(names, images, strict=True)]

    def _detect(self, file: str, width: int, height: int) -> list[Detection]:
        path = self.folder / PurePosixPath(file).with_suffix(".png")
        if not os.path.lexists(path):
            return []
        if reason := refusal(path, self.folder.resolve()):
            raise AnabranchError(f"the mask {path} cannot be read", received=reason)
        try:
            with path.open("rb") as file, open_picture(file) as picture:
                mask = np.asarray(picture.convert("L"))
        except UNREADABLE as error:
            raise AnabranchError(f"the mask {path} cannot be read", received=str(error)) from error
        if mask.shape != (height, width):
            received = f"{mask.shape[1]} x {mask.shape[0]}"
            raise AnabranchError(
                f"the mask {path} has another size than its image", expected=f"{width} x {height}", received=received
            )
        return [Detection(1.0, tuple(map(float, box))) for box in component_boxes(mask > WHITE)]


def named(detector: str, files: Sequence[str] | None) -> Sequence[str]:
    if files is None:
        raise UsageError(f"{detector} looks images up by name", hint="hand over their names: detect(images, files)")
    return files


# one line an image


def read_jsonl(path: Path) -> dict[str, Entry]:
    """Lines with `file` or `file_name`, `boxes`, and where there are any `has_concept` and `scores`."""
    entries: dict[str, Entry] = {}
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:  # a broken letter is refused in its line
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, entry = _entry(line, f"{path}, line {number}")
            if name in entries:
                raise AnabranchError(f"{path}, line {number}: {name!r} is listed twice")
            entries[name] = entry
    return entries


def _entry(line: str, where: str) -> tuple[str, Entry]:
    try:
        row = json.loads(line.encode("utf-8", "surrogateescape"))
        name = row.get("file", row.get("file_name"))
        boxes = tuple(tuple(float(edge) for edge in box) for box in row.get("boxes") or ())
        scores = tuple(float(score) for score in row.get("scores") or [1.0] * len(boxes))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise AnabranchError(
            f"{where}: cannot be used", expected="an object with file and boxes", received=str(error)
        ) from error
    if not isinstance(name, str) or any(len(box) != 4 for box in boxes) or len(scores) != len(boxes):
        expected = "file, boxes of four numbers each, and as many scores as boxes where there are any"
        raise AnabranchError(f"{where}: cannot be used", expected=expected, received=line.strip()[:120])
    return name, Entry(bool(row.get("has_concept", boxes)), boxes, scores)


def listed(entries: dict[str, Entry], path: Path) -> LookUp:
    if not entries:
        raise UsageError(f"{path} lists no images", expected="every image of the folder, also those without a box")

    def look_up(file: str, width: int, height: int) -> list[Detection]:
        if file not in entries:
            near = did_you_mean(file, entries) if len(entries) <= 20 else None
            raise AnabranchError(f"{path} does not list {file!r}", expected="every image of the folder", hint=near)
        entry = entries[file]
        found = [Detection(score, box) for score, box in zip(entry.scores, entry.boxes, strict=True)]
        return found or ([Detection(1.0, None)] if entry.has_concept else [])

    return look_up


# COCO


def coco(path: Path, concept: str) -> LookUp:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in document["images"]}
        category = the_category({c["id"]: c["name"] for c in document.get("categories", [])}, concept, path)
        entries: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
        for annotation in document["annotations"]:
            if category is None or annotation["category_id"] == category:
                entries[names[annotation["image_id"]]].append(annotation)
        rows = {name: _coco_entry(annotations) for name, annotations in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        expected = "images, annotations with bbox, and categories"
        raise UsageError(f"{path} is not a COCO file", expected=expected, received=repr(error)) from error
    return listed(rows, path)


def _coco_entry(annotations: list[dict[str, Any]]) -> Entry:
    boxes = []
    for annotation in annotations:
        x, y, width, height = map(float, annotation["bbox"])
        boxes.append((x, y, x + width, y + height))
    return Entry(bool(boxes), tuple(boxes), tuple(float(annotation.get("score", 1.0)) for annotation in annotations))


def the_category(names: dict[int, str], concept: str, path: Path) -> int | None:
    """The category of the concept; None where there is nothing to choose from."""
    chosen = [number for number, name in names.items() if name == concept]
    if chosen:
        return chosen[0]
    if len(names) <= 1:
        return None
    raise UsageError(
        f"{path} holds several categories, none of them {concept!r}" if concept else f"{path} holds several categories",
        hint=f"name one with --concept: {did_you_mean(concept, names.values())}",
    )


# YOLO


def yolo(folder: Path, concept: str) -> LookUp:
    """A .txt file an image, named after it; classes.txt names the classes where there are several."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.txt"))}
    classes = files.pop("classes.txt", None)
    if not files:
        raise UsageError(f"{folder}: no boxes", expected="a folder of .txt files named after the images")
    lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in files.items()}
    names = {} if classes is None else dict(enumerate(classes.read_text(encoding="utf-8").split()))
    category = the_category(names, concept, folder)
    numbers = {line.split()[0] for rows in lines.values() for line in rows if line.strip()}
    if category is None and len(numbers) > 1:
        received = f"classes {', '.join(sorted(numbers)[:5])}"
        raise UsageError(f"{folder}: several classes", expected="their names in classes.txt", received=received)

    def look_up(file: str, width: int, height: int) -> list[Detection]:
        name = PurePosixPath(file).with_suffix(".txt").as_posix()
        rows = [(i, line) for i, line in enumerate(lines.get(name, ()), 1) if line.strip()]
        found = [_yolo_box(line, f"{folder / name}, line {i}", width, height) for i, line in rows]
        return [detection for number, detection in found if category is None or number == category]

    return look_up


def _yolo_box(line: str, where: str, width: int, height: int) -> tuple[int, Detection]:
    try:
        number, x, y, w, h, *score = line.split()
        x, y, w, h = (float(value) for value in (x, y, w, h))
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        return int(number), Detection(float(score[0]) if score else 1.0, box)
    except ValueError as error:
        expected = "class x_center y_center width height, in shares of the image"
        raise AnabranchError(f"{where}: cannot be used", expected=expected, received=line.strip()[:120]) from error
