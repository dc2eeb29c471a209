# SPDX-License-Identifier: Apache-2.0
"""How far boxes cover each other, and which of several covering boxes to keep."""

from collections.abc import Sequence

import numpy as np

from anabranch.suppress.detectors.protocol import Box, Detection


def iou(a: Box, b: Box) -> float:
    """Area of the intersection / area of the union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / (area(a) + area(b) - common)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def non_maximum_suppression(detections: Sequence[Detection], most: float) -> list[Detection]:
    """The best first; a box that overlaps a better one by more than `most` (IoU) is dropped."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if all(iou(detection.box, other.box) <= most for other in kept):
            kept.append(detection)
    return kept


def best_overlaps(truth: Sequence[Box], found: Sequence[Box]) -> list[float]:
    """For every true box the IoU of the found box that fits it best, 0 where nothing was found."""
    return [max((iou(box, other) for other in found), default=0.0) for box in truth]


def component_boxes(cells: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(x1, y1, x2, y2) of each 4-connected component of a boolean grid, half-open, from the top."""
    from scipy import ndimage

    labels, _ = ndimage.label(cells)
    return [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in ndimage.find_objects(labels)]
