# SPDX-License-Identifier: Apache-2.0
"""A flow from names on the left to names on the right, as wide as what goes there."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from anabranch.report.canvas import INK, MUTED, SERIES, Canvas, canvas, text_width
from anabranch.report.page import Figure, Table
from anabranch.report.text import level

HEIGHT, GAP, BLOCK, BETWEEN = 340.0, 8.0, 12.0, 300.0
LEAST = 0.02
"""A thinner stream than this share of its source is left out of the picture; the table has it."""
BENDS = 24


def flow(shares: ArrayLike, sources: Sequence[str], sinks: Sequence[str], title: str, *, unit: str = "%") -> Figure:
    """Streams from every source to every sink, coloured by source.

    shares      (sources, sinks), in percent of a source; a row sums to 100
    """
    values = np.array(shares, dtype=float)
    if values.shape != (len(sources), len(sinks)):
        raise ValueError(f"shares: expected {(len(sources), len(sinks))}, received {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any() or (values.sum(1) <= 0).any():
        raise ValueError("shares: expected finite numbers from 0, some of every source above it")
    rows = [[name, *(level(value, 1) for value in row)] for name, row in zip(sources, values, strict=True)]
    strongest = [f"{name} mostly to {sinks[int(row.argmax())]}" for name, row in zip(sources, values, strict=True)]
    return Figure(
        svg=drawn(values, sources, sinks), caption=title, alt=f"{title}. {'; '.join(strongest)}.",
        table=Table(f"{title}, {unit}", ["from", *sinks], rows),
        notes=[f"Streams under {100 * LEAST:.0f} % of their source are left out of the picture."],
    )  # fmt: skip


def drawn(values: NDArray[np.float64], sources: Sequence[str], sinks: Sequence[str]) -> Markup:
    left = text_width(sources, most=22) + 10
    right = left + BLOCK + BETWEEN + BLOCK
    scale = (HEIGHT - GAP * (max(values.shape) - 1)) / values.sum()
    starts, ends = places(values.sum(1) * scale), places(values.sum(0) * scale)
    with canvas(right + text_width(sinks, most=22) + 14, HEIGHT + 8) as drawing:
        for i, name in enumerate(sources):
            color = SERIES[i % len(SERIES)]
            drawing.rectangle(left, 4 + starts[i], BLOCK, values[i].sum() * scale, color)
            drawing.text(left - 8, 4 + starts[i] + values[i].sum() * scale / 2, name, align="right", most=22)
        for j, name in enumerate(sinks):
            drawing.rectangle(right - BLOCK, 4 + ends[j], BLOCK, values[:, j].sum() * scale, MUTED)
            drawing.text(right + 8, 4 + ends[j] + values[:, j].sum() * scale / 2, name, color=INK, most=22)
        leaving, arriving = starts.copy(), ends.copy()
        for i, j in np.ndindex(*values.shape):
            width = values[i, j] * scale
            if values[i, j] >= LEAST * values[i].sum():
                place = (left + BLOCK, right - BLOCK, 4 + leaving[i], 4 + arriving[j])
                stream(drawing, *place, width, SERIES[i % len(SERIES)])
            leaving[i] += width
            arriving[j] += width
        return drawing.svg()


def places(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each block starts, with the same room between all, in the middle of the picture."""
    free = HEIGHT - sizes.sum()
    gap = min(GAP, free / max(len(sizes) - 1, 1))
    tops = np.concatenate(([0.0], np.cumsum(sizes[:-1] + gap)))
    return np.asarray(tops + (free - gap * (len(sizes) - 1)) / 2)


def stream(drawing: Canvas, x1: float, x2: float, y1: float, y2: float, width: float, color: str) -> None:
    share = np.linspace(0, 1, BENDS)
    bend = share * share * (3 - 2 * share)
    xs, ys = x1 + (x2 - x1) * share, y1 + (y2 - y1) * bend
    corners = [*zip(xs, ys, strict=True), *zip(xs[::-1], ys[::-1] + width, strict=True)]
    drawing.polygon([(float(x), float(y)) for x, y in corners], color, 0.45)
