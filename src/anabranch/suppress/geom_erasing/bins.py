# SPDX-License-Identifier: Apache-2.0
"""Boxes to bins of a grid, and the weight of every bin in the loss.

Paper     : Geom-Erasing (ECCV 2024, arXiv 2310.05873): location bins and loss re-weighting, from a reading note of it.
Equation  : A1 = floor(a1 / W_bin), A2 = ceil(a2 / W_bin) - 1, likewise B1, B2 from b1, b2; W_bin = W / G_x
            w = T / (K + alpha (T - K)) in the region, alpha T / (K + alpha (T - K)) outside; the sum of w is T
Shapes    : a grid of G_x columns and G_y rows has T bins; K of them are covered; w (G_y, G_x); boxes x1 y1 x2 y2.
Differs   : half-open boxes: the printed floor(a2 / W_bin) adds an empty bin when a box ends on a boundary and leaves
            the grid at its right edge; `closed` gives that formula, kept inside the grid.
Check     : bins of known boxes; w = .5161 and 1.0323 for 4 of 64 bins (tests/suppress/geom_erasing/test_bins.py)
Exempt    : inf (an infinite alpha leaves the region out)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Box = Sequence[float]
Bin = tuple[int, int]
"""(m, n): column, row."""


@dataclass(frozen=True)
class Grid:
    columns: int
    rows: int

    def __post_init__(self):
        if self.columns < 1 or self.rows < 1:
            raise ValueError(f"grid: expected at least 1 x 1, received {self.columns} x {self.rows}")

    def __len__(self) -> int:
        return self.columns * self.rows

    def bins(self) -> list[Bin]:
        """All of them, row by row."""
        return [(m, n) for n in range(self.rows) for m in range(self.columns)]

    def number(self, place: Bin) -> int:
        """Position in `bins()`."""
        return place[1] * self.columns + place[0]


def span(low: float, high: float, size: float, count: int, closed: bool) -> range:
    """Bins along one axis that [low, high) touches; `closed` is the paper's printed formula."""
    width = size / count
    last = math.floor(high / width) if closed else math.ceil(high / width) - 1
    first = min(math.floor(low / width), count - 1)
    return range(first, max(first, min(last, count - 1)) + 1)


def covered_bins(boxes: Iterable[Box], width: float, height: float, grid: Grid, *, closed: bool = False) -> list[Bin]:
    """The bins that any of the boxes touches, row by row, each once. Boxes are clipped to the image.

    Raises:
        ValueError: a box without area, with NaN, or wholly outside the image.
    """
    found = set()
    for box in boxes:
        x1, y1, x2, y2 = clipped(box, width, height)
        columns = span(x1, x2, width, grid.columns, closed)
        rows = span(y1, y2, height, grid.rows, closed)
        found |= {(m, n) for n in rows for m in columns}
    return sorted(found, key=grid.number)


def clipped(box: Box, width: float, height: float) -> tuple[float, float, float, float]:
    if not all(map(math.isfinite, (*box, width, height))):  # clipped, infinity would be the border
        raise ValueError(f"box: expected finite numbers, received {box} in {width} x {height}")
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):  # NaN fails as well
        raise ValueError(f"box: expected x1 < x2 and y1 < y2, received {tuple(box)}")
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise ValueError(f"box: expected a part inside {width} x {height}, received {tuple(box)}")
    return max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)


def region_weights(covered: Iterable[Bin], grid: Grid, alpha: float) -> Tensor:
    """w (rows, columns): K bins in the region weigh T / (K + alpha (T - K)), the others alpha times that."""
    if not alpha > 0:
        raise ValueError(f"alpha: expected above 0, received {alpha}")
    inside = torch.zeros(grid.rows, grid.columns, dtype=torch.bool)
    for m, n in covered:
        inside[n, m] = True
    T, K = len(grid), int(inside.sum())
    if K in (0, T) or alpha == 1:
        return torch.ones(grid.rows, grid.columns)
    if math.isinf(alpha):
        return torch.where(inside, 0.0, T / (T - K))
    unit = T / (K + alpha * (T - K))
    return torch.where(inside, unit, alpha * unit)


def upsampled(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., rows, columns) -> (..., h, w): nearest where the grid divides the latents, else by area; the mean stays."""
    rows, columns = weights.shape[-2:]
    if size[0] % rows == 0 and size[1] % columns == 0:
        return weights.repeat_interleave(size[0] // rows, -2).repeat_interleave(size[1] // columns, -1)
    flat = weights.reshape(-1, 1, rows, columns)
    fine = flat.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)
    return F.adaptive_avg_pool2d(fine, size).reshape(*weights.shape[:-2], *size)
