# SPDX-License-Identifier: Apache-2.0
"""Where a black-box classifier sees the concept: cover one cell after the other and watch the probability fall.

Paper     : Zeiler and Fergus 2014 (arXiv 1311.2901), occlusion sensitivity.
Equation  : cell (m, n) counts where p(image) - p(image with the cell grey) > 0.3 * p(image); boxes are those of the
            4-connected components of the cells that count.
Shapes    : image (H, W, 3) uint8; G x G cells, whose edges are the rounded multiples of W / G and H / G.
Differs   : a grid of cells instead of a sliding square, for boxes become cells later anyway. No box comes back where
            no single cell matters: the concept is spread, or larger than what one cell hides.
Check     : a closed-form classifier of one square gives back the cells it touches
            (tests/suppress/detectors/test_occlusion.py).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from anabranch.suppress.detectors.overlap import component_boxes
from anabranch.suppress.detectors.protocol import Box

GREY = 127
LEAST_FALL = 0.3
BATCH = 16


def occlusion_boxes(
    probability: Callable[[Sequence[np.ndarray]], np.ndarray],
    image: np.ndarray,
    *,
    grid: int = 8,
    least_fall: float = LEAST_FALL,
) -> list[Box]:
    """One box a connected group of cells that the classifier needs; `probability` maps images to p, (N,)."""
    if grid < 1:
        raise ValueError(f"grid: expected at least 1, received {grid}")
    if not 0 <= least_fall <= 1:
        raise ValueError(f"least_fall: expected 0 to 1, received {least_fall}")
    xs, ys = edges(image.shape[1], grid), edges(image.shape[0], grid)
    falls = relative_falls(probability, image, xs, ys)
    return [
        (float(xs[m1]), float(ys[n1]), float(xs[m2]), float(ys[n2]))
        for m1, n1, m2, n2 in component_boxes(falls > least_fall)
    ]


def relative_falls(
    probability: Callable[[Sequence[np.ndarray]], np.ndarray], image: np.ndarray, xs: list[int], ys: list[int]
) -> np.ndarray:
    """(p - p_mn) / p for every cell, (G, G), rows first."""
    before = float(probability([image])[0])
    if before <= 0:
        return np.zeros((len(ys) - 1, len(xs) - 1))
    cells = [(y1, y2, x1, x2) for y1, y2 in pairwise(ys) for x1, x2 in pairwise(xs)]
    after: list[float] = []
    for start in range(0, len(cells), BATCH):
        after += np.asarray(probability([covered(image, *cell) for cell in cells[start : start + BATCH]])).tolist()
    return (before - np.reshape(after, (len(ys) - 1, len(xs) - 1))) / before


def covered(image: np.ndarray, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
    out = image.copy()
    out[y1:y2, x1:x2] = GREY
    return out


def edges(side: int, grid: int) -> list[int]:
    """0 = e_0 < e_1 < ... = side, at most `grid` cells."""
    return sorted({round(i * side / min(grid, side)) for i in range(min(grid, side) + 1)})
