# SPDX-License-Identifier: Apache-2.0
"""Boxes through the same geometry as the pixels: resize and centre-crop as `decode` does it, and mirrored.

Boxes     : (x1, y1, x2, y2) in pixels, half-open; fractions of a pixel are kept.
Equation  : s = size / min(W, H); x' = (x - (W - min(W, H)) / 2) * s, likewise y'; cut at 0 and `size`.
Dropped   : a box of which more than 90 % of the area is cut off.
Check     : a rectangle painted and decoded lies where its box says (tests/data/test_boxes.py).
"""

from collections.abc import Sequence

Box = tuple[float, float, float, float]
MOST_CUT = 0.9


def transform_boxes(boxes: Sequence[Sequence[float]], width: int, height: int, size: int) -> list[Box]:
    """Boxes of a width x height image in its size x size square; those that are cut off are left out."""
    side = min(width, height)
    left, top, scale = (width - side) / 2, (height - side) / 2, size / side
    moved = [
        ((x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale, (y2 - top) * scale) for x1, y1, x2, y2 in boxes
    ]
    return [cut for box in moved if (cut := clip(box, size, size)) is not None]


def clip(box: Box, width: float, height: float) -> Box | None:
    """The part inside the image, or None where more than 90 % of the area lies outside."""
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    if x1 >= x2 or y1 >= y2:
        return None
    kept = (x2 - x1) * (y2 - y1) / ((box[2] - box[0]) * (box[3] - box[1]))
    return (x1, y1, x2, y2) if kept >= 1 - MOST_CUT - 1e-9 else None


def flip_boxes(boxes: Sequence[Sequence[float]], width: float) -> list[Box]:
    """Mirrored left to right: x1' = W - x2, x2' = W - x1."""
    return [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
