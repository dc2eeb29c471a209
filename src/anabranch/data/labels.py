# SPDX-License-Identifier: Apache-2.0
"""What a detector found in a folder of images: one JSON line an image, and a `.json` beside it that says who looked.

Lines     : file (relative to the folder of images), width, height (upright), sha256, score, boxes, scores,
            has_concept, and of a second detector second_score and second_has_concept.
Beside    : labels.json for labels.jsonl: folder, detector, threshold, concept, counts and how far to trust them.
Written   : both to temporary files first; the `.json` is renamed last, so that lines without it are unfinished.
Read      : every line is compared with the file on disk; lines may be edited by hand and are checked again.
"""

import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from anabranch.data.boxes import Box
from anabranch.data.decode import ORIENTATION_TAG, TURNS, UNREADABLE, explain, open_picture, sha256_of
from anabranch.data.folders import in_threads, refusal
from anabranch.errors import AnabranchError, UsageError

MADE_BY = "anabranch erase scan"
TURNED = [tag for tag, turn in TURNS.items() if tag >= 5]  # width and height change places


@dataclass(frozen=True)
class Label:
    """What is known of one image."""

    file: str
    width: int
    height: int
    boxes: tuple[Box, ...]
    score: float
    has_concept: bool
    sha256: str = ""
    scores: tuple[float, ...] = ()
    second_score: float | None = None
    second_has_concept: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Labels:
    root: Path
    """The folder of the images."""
    detector: str
    version: str
    threshold: float
    concept: str
    rows: tuple[Label, ...]


def header_path(path: Path) -> Path:
    return path.with_suffix(".json")


# write


def refuse_strangers(path: Path) -> None:
    """Only the labels of an earlier scan may be replaced."""
    beside = header_path(path)
    if path.suffix != ".jsonl":
        raise UsageError(f"{path}: labels need another name", expected="a name that ends in .jsonl")
    if not any(os.path.lexists(name) for name in (path, beside)):
        return
    ours = path.is_file() and not path.is_symlink() and not beside.is_symlink() and _read_header(beside) is not None
    if not ours:
        raise UsageError(
            f"{path if os.path.lexists(path) else beside} would be lost",
            expected="a free name, or the labels of an earlier scan",
            hint="name another file",
        )


def write_labels(path: Path, rows: Sequence[Label], header: dict[str, Any]) -> None:
    """`path` and the `.json` beside it; refuses what `read_labels` would refuse, and files that are no labels."""
    refuse_strangers(path)
    names: set[str] = set()
    for number, row in enumerate(rows, 1):
        _check_row(row, names, f"{path}, line {number}")
    document = {"format": 1, "made_by": MADE_BY, **header}
    lines = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    token = secrets.token_hex(4)
    beside = header_path(path)
    new = [(file, file.with_name(f".{file.name}.new-{token}")) for file in (path, beside)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for (_, temporary), text in zip(
            new, (lines, json.dumps(document, indent=1, allow_nan=False) + "\n"), strict=True
        ):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        beside.unlink(missing_ok=True)  # a crash from here on leaves lines that nobody vouches for, which are refused
        for target, temporary in new:
            os.replace(temporary, target)
    except OSError as error:
        raise AnabranchError(f"could not write {path}: {error}", hint="make room or choose another disk") from error
    finally:
        for _, temporary in new:
            temporary.unlink(missing_ok=True)


# read


def read_labels(path: Path, images: Path | None = None) -> Labels:
    """The labels, every line checked against its image; `images` says where the folder is now, if it was moved."""
    if not path.is_file():
        raise UsageError(
            f"{path} cannot be read", expected="the labels.jsonl of anabranch erase scan", received="no such file"
        )
    header = _read_header(header_path(path))
    if header is None:
        raise UsageError(
            f"{path} cannot be trusted",
            expected=f"{header_path(path).name} beside it, as anabranch erase scan writes it last",
            hint="scan the images again",
        )
    root = Path(header["images"]) if images is None else images
    if not root.is_dir():
        raise UsageError(f"{path}: the folder of its images is gone", expected=root, hint="say where it is now: images")
    numbered = _read_rows(path)
    if not numbered:
        raise UsageError(f"{path} holds no images")
    found = in_threads(lambda pair: _compare(root, pair[1]), numbered)
    problems = [(*pair, problem) for pair, problem in zip(numbered, found, strict=True) if problem is not None]
    if problems:
        number, row, problem = problems[0]
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise AnabranchError(
            f"{path}, line {number}: {row.file!r} {problem}{more}",
            expected=f"the images in {root} as they were scanned",
            hint="scan again, or say where the folder is now: images",
        )
    detector = header["detector"]
    return Labels(
        root=root,
        detector=detector["name"],
        version=detector["version"],
        threshold=float(detector["threshold"]),
        concept=header["concept"],
        rows=tuple(row for _, row in numbered),
    )


def refuse_changed(labels: Labels) -> None:
    """Hash every image; slower than `read_labels`, which compares sizes only."""
    same = in_threads(lambda row: row.sha256 in ("", sha256_of(labels.root / row.file)), labels.rows)
    changed = [row.file for row, unchanged in zip(labels.rows, same, strict=True) if not unchanged]
    if changed:
        raise AnabranchError(
            f"{len(changed)} images changed since they were scanned, the first is {changed[0]!r}", hint="scan again"
        )


def _read_header(path: Path) -> dict[str, Any] | None:
    """None where it is missing or not ours."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(header, dict) and header.get("format") == 1 and header.get("made_by") == MADE_BY
    detector = header.get("detector") if whole else None
    if not isinstance(detector, dict) or not {"name", "version", "threshold"} <= detector.keys():
        return None
    return header if isinstance(header.get("images"), str) and isinstance(header.get("concept"), str) else None


def _read_rows(path: Path) -> list[tuple[int, Label]]:
    """(line number, label)."""
    rows: list[tuple[int, Label]] = []
    names: set[str] = set()
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:  # a broken letter is refused in its line
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = _parse(line, f"{path}, line {number}")
                _check_row(row, names, f"{path}, line {number}")
                rows.append((number, row))
    return rows


def _parse(line: str, where: str) -> Label:
    try:
        row = json.loads(line.encode("utf-8", "surrogateescape"))
        if not isinstance(row["has_concept"], bool):
            raise TypeError("has_concept is neither true nor false")
        return Label(
            file=str(row["file"]),
            width=int(row["width"]),
            height=int(row["height"]),
            boxes=tuple(tuple(float(edge) for edge in box) for box in row["boxes"]),
            score=float(row["score"]),
            has_concept=row["has_concept"],
            sha256=str(row.get("sha256", "")),
            scores=tuple(float(score) for score in row.get("scores", ())),
            second_score=row.get("second_score"),
            second_has_concept=row.get("second_has_concept"),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        expected = "file, width, height, boxes, score and has_concept of one image"
        raise AnabranchError(f"{where}: not a label", expected=expected, received=repr(error)) from error


def _check_row(row: Label, names: set[str], where: str) -> None:
    """A usable name that was not used before, and boxes inside the image."""
    if not is_inside(row.file):
        raise AnabranchError(f"{where}: unsafe file name {row.file!r}", expected="a name inside the folder of images")
    if row.file in names:
        raise AnabranchError(f"{where}: {row.file!r} is listed twice", expected="one line an image")
    names.add(row.file)
    if not math.isfinite(row.score):
        raise AnabranchError(f"{where}: the score is not a finite number", received=row.score)
    for box in row.boxes:
        if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
            raise AnabranchError(f"{where}: a box is not four finite numbers", received=list(box))
        if box[0] >= box[2] or box[1] >= box[3]:
            hint = "this looks like xywh; boxes are x1, y1, x2, y2"
            raise AnabranchError(f"{where}: an empty or reversed box", received=list(box), hint=hint)
        if box[0] < 0 or box[1] < 0 or box[2] > row.width or box[3] > row.height:
            expected = f"inside 0, 0, {row.width}, {row.height}"
            raise AnabranchError(f"{where}: a box outside the image", expected=expected, received=list(box))
    if row.boxes and not row.has_concept:
        raise AnabranchError(f"{where}: boxes of a concept that the image does not have", expected="has_concept true")


def is_inside(name: str) -> bool:
    """Whether a name read from a file stays inside its folder."""
    plain = name.isprintable() and "\\" not in name and len(name) <= 1024
    return plain and bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def _compare(root: Path, row: Label) -> str | None:
    """How a file differs from its label."""
    path = root / PurePosixPath(row.file)
    if os.path.lexists(path) and (reason := refusal(path, root.resolve())):
        return f"cannot be used: {reason}"
    try:
        with path.open("rb") as file, open_picture(file) as picture:
            size = picture.size
            # Pillow decodes a whole PNG to look for an orientation, so only a size that differs makes it look.
            look = picture.format != "PNG" or size != (row.width, row.height)
            if look and picture.getexif().get(ORIENTATION_TAG) in TURNED:
                size = size[::-1]
    except FileNotFoundError:
        return "is missing"
    except UNREADABLE as error:
        return explain(error)
    if size != (row.width, row.height):
        return f"is {size[0]} x {size[1]} pixels, the label says {row.width} x {row.height}"
    return None
