# SPDX-License-Identifier: Apache-2.0
"""What a detector is: images in, scored boxes out. Anything with these attributes is one.

Boxes     : (x1, y1, x2, y2) in pixels of the image that was handed in, half-open, x to the right and y down.
Scores    : `detect` returns every candidate; whoever asks applies the threshold, with `contains`.
Checked   : what a detector returns is compared with the image before anybody believes it (`detect_checked`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Protocol

import numpy as np

from anabranch.errors import AnabranchError, UsageError

Box = tuple[float, float, float, float]
SLACK = 1.0
"""Pixels by which rounding may carry a box over the edge of its image."""


@dataclass(frozen=True)
class Detection:
    """One candidate. `box` None: the concept is in the image, the detector does not say where."""

    score: float
    box: Box | None
    label: str = ""


class Detector(Protocol):
    name: str
    version: str
    threshold: float
    """An image contains the concept where a score is above this."""

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        """Candidates of each uint8 (H, W, 3) image; `files` names them for detectors that look boxes up by name."""


def contains(detections: Sequence[Detection], threshold: float) -> bool:
    """any p_i > tau."""
    return any(detection.score > threshold for detection in detections)


def detect_checked(
    detector: Detector, images: Sequence[np.ndarray], files: Sequence[str] | None = None
) -> list[list[Detection]]:
    """`detector.detect`, one answer an image, every box inside its image."""
    answers = detector.detect(images, files)
    if len(answers) != len(images):
        raise AnabranchError(
            f"detector {detector.name} lost count", expected=f"{len(images)} lists, one an image", received=len(answers)
        )
    return [
        checked(answer, image.shape[1], image.shape[0], detector=detector.name)
        for answer, image in zip(answers, images, strict=True)
    ]


def checked(detections: Sequence[Detection], width: int, height: int, *, detector: str) -> list[Detection]:
    """The same candidates; a box at most one pixel outside is clipped, anything else that is wrong raises.

    Raises:
        AnabranchError: a score or box that is not finite, an empty or reversed box, a box outside the image.
    """
    return [_checked(detection, width, height, detector) for detection in detections]


def _checked(detection: Detection, width: int, height: int, detector: str) -> Detection:
    if not math.isfinite(detection.score):
        raise AnabranchError(f"detector {detector} returned a score that is no number", received=detection.score)
    if detection.box is None:
        return detection
    if problem := box_problem(detection.box, width, height):
        what, expected, hint = problem
        raise AnabranchError(
            f"detector {detector} returned {what}", expected=expected, received=detection.box, hint=hint
        )
    x1, y1, x2, y2 = (float(edge) for edge in detection.box)
    return replace(detection, box=(max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))))


def box_problem(box: Sequence[float], width: int, height: int) -> tuple[str, str, str | None] | None:
    """(what is wrong, what was expected, what to try), or None for a usable box."""
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        return "a box that is not four finite numbers", "x1, y1, x2, y2 in pixels", None
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return "an empty or reversed box", "x1 < x2 and y1 < y2", "this looks like xywh; hand over x1, y1, x2, y2"
    if x1 < -SLACK or y1 < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        return "a box outside the image", f"inside 0, 0, {width}, {height}", "were the boxes made at another size?"
    if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        return "a box outside the image", f"inside 0, 0, {width}, {height}", None
    return None


def needed(module: str, install: str = "pip install 'anabranch[erase]'") -> ModuleType:
    """An optional package, imported once a detector that stands on it is made."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"this detector needs {module}", received=str(error), hint=install) from error
