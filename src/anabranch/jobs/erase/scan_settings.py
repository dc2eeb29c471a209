# SPDX-License-Identifier: Apache-2.0
"""What a scan can be told. Light on purpose: the command line reads this without importing torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Geometry = Literal["occlusion", "full", "none"]


@dataclass(frozen=True, kw_only=True)
class ScanFlags:
    images: Path | None = None
    """The folder of images to look through, any nesting."""
    detector: str = ""
    """Who looks: qr, text, read-text, template:FILE.png, zero-shot:FOLDER, classifier:FOLDER:LABEL, boxes:FILE or
    masks:FOLDER."""
    out: Path = Path("labels.jsonl")
    """The labels to write, one line an image; labels.json beside it says who looked."""
    second_detector: str = ""
    """Another detector, to see how far the first can be trusted."""
    clean: Path | None = None
    """A folder of images that do not contain the concept, to measure false alarms on."""
    threshold: float | None = None
    """An image contains the concept where a score is above this; the detector's own by default."""
    concept: str = ""
    """The name of the concept, such as watermark; what a zero-shot detector is asked for."""
    known: Path | None = None
    """A metadata.jsonl with file_name, has_concept and boxes of images whose truth is known, to measure recall on."""


@dataclass(frozen=True, kw_only=True)
class ScanSettings(ScanFlags):
    second_threshold: float | None = None
    geometry: Geometry = "occlusion"
    """How a classifier places boxes: by covering cells, on the full image, or not at all."""
    grid: int = 8
    """Cells a side that are covered one after the other for the occlusion geometry."""
    batch_size: int = 8
    """Images that a detector is handed at once."""
