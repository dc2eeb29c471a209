# SPDX-License-Identifier: Apache-2.0
"""Implicit Concept Dataset: marks that no caption names, on a known share of images, with boxes that tell where.

Paper     : arXiv 2310.05873 has the sets QR, watermark and text. Sizes, places and opacities are ours; each kind's
            file says which. The kind patch is for small images.
Random    : all draws for an image come from the one generator that it is given.
Check     : outside the boxes nothing changes, boxes are tight, QR codes scan (tests/jobs/erase/test_icd.py).
"""

from typing import NamedTuple

import numpy as np

from anabranch.data.icd import patch, qr, text, watermark
from anabranch.data.icd.look import Look, check_ranges
from anabranch.data.marks import Box, stamp_into
from anabranch.errors import UsageError, did_you_mean

KINDS = {"qr": qr, "watermark": watermark, "text": text, "patch": patch}
"""Modules with `check(look)`, `least_side(look)`, `opacity(look)` and `draw(height, width, look, generator)`."""

__all__ = ["KINDS", "Look", "Marked", "add_mark", "check_look", "choose_marked", "least_side", "refuse_small"]


class Marked(NamedTuple):
    pixels: np.ndarray
    boxes: list[Box]
    opacity: float


def add_mark(image: np.ndarray, kind: str, look: Look, generator: np.random.Generator) -> Marked:
    """A copy of the image (uint8, (H, W) or (H, W, 3)) with one mark of the kind; a tiled one has many boxes."""
    check_look(kind, look)
    height, width = image.shape[:2]
    refuse_small(height, width, kind, look)
    opacity = float(generator.uniform(*KINDS[kind].opacity(look)))
    pixels = image.copy()
    placed = KINDS[kind].draw(height, width, look, generator)
    boxes = [stamp_into(pixels, mark.glyph, mark.x, mark.y, opacity) for mark in placed]
    return Marked(pixels, [box for box in boxes if box is not None], opacity)


def choose_marked(num_images: int, ratio: float, seed: int) -> np.ndarray:
    """(N,) bool, true for round(ratio N) of the images, chosen at random."""
    if not 0 <= ratio <= 1:
        raise UsageError("the ratio is no share of the images", expected="0 to 1", received=ratio)
    chosen = np.zeros(num_images, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(num_images)[: round(ratio * num_images)]] = True
    return chosen


def check_look(kind: str, look: Look) -> None:
    """Everything that can be wrong with a mark before an image is seen."""
    if kind not in KINDS:
        raise UsageError(
            f"there is no kind {kind!r} of mark", expected=", ".join(KINDS), hint=did_you_mean(kind, KINDS)
        )
    check_ranges(look)
    KINDS[kind].check(look)


def least_side(kind: str, look: Look) -> int:
    """The short side, in pixels, below which an image has no room for the mark."""
    side: int = KINDS[kind].least_side(look)
    return side


def refuse_small(height: int, width: int, kind: str, look: Look, name: str = "the image") -> None:
    least = least_side(kind, look)
    if min(height, width) < least:
        raise UsageError(
            f"{name} is too small for a mark of kind {kind}",
            expected=f"at least {least} pixels on the smallest side",
            received=f"{width} x {height}",
            hint="leave it out" if kind == "patch" else "leave it out, or --kind patch, which is for small images",
        )
