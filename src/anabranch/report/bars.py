# SPDX-License-Identifier: Apache-2.0
"""Rates as horizontal bars from zero, each with its interval, its number and a word."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.report.canvas import GROUND, INK, MUTED, RULE, SERIES, Canvas, canvas, text_width
from anabranch.report.lines import Scale, fit_scale
from anabranch.report.page import Figure, Table
from anabranch.report.text import cell, estimate, interval, is_missing, level, plain

PLOT, TOP, STEP, THICKNESS = 400, 34, 30, 14
MOST_NAME, MOST_NOTE = 40, 36
LEAST = 1e-3  # a scale finer than this shows rounding


class RateRow(NamedTuple):
    """A rate with its interval in the unit of the figure (per cent: 0..100), and a word on it."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    @property
    def written(self) -> str:
        return estimate(self.value, self.low, self.high, write=level)


def rate_bars(
    rows: Sequence[RateRow],
    title: str,
    unit: str = "%",
    reference: float | None = None,
    *,
    reference_name: str = "reference",
) -> Figure:
    """Bars from zero with their intervals; `reference` draws a dashed line through all of them."""
    rates = [RateRow(*row) for row in rows]
    numbers = np.array([[plain(end) for end in rate[1:4]] for rate in rates], dtype=float).reshape(-1, 3)
    if (numbers[:, :1] < 0).any() or (not is_missing(reference) and reference < 0):
        raise ValueError(f"rows: expected rates of at least 0, received {[*numbers[:, 0].tolist(), reference]}")
    left = max(text_width([rate.name for rate in rates], size=13, most=MOST_NAME), 60) + 16
    to_x = from_zero(np.append(numbers, np.nan if reference is None else reference), left)
    shown = to_x.end + 24 + text_width([rate.written for rate in rates])
    width = shown + 18 + text_width([rate.note for rate in rates], most=MOST_NOTE)
    bottom = TOP + STEP * len(rates)
    with canvas(width, bottom + 42) as drawing:
        draw_scale(drawing, to_x, bottom, unit)
        for row, rate in enumerate(rates):
            draw_bar(drawing, rate, to_x, TOP + (row + 0.5) * STEP, shown)
        if not is_missing(reference):
            x = to_x(reference)
            drawing.line([x, x], [TOP - 6, bottom], INK, 1.25, (4, 3))
            drawing.text(x, TOP - 16, f"{reference_name} {level(reference)}", size=11, align=side(x, to_x), color=INK)
        picture = drawing.svg()
    listed = [[rate.name, level(rate.value), interval(rate.low, rate.high, write=level), rate.note] for rate in rates]
    words = [f"{rate.name} {rate.written}{f', {rate.note}' if rate.note else ''}" for rate in rates]
    against = "" if is_missing(reference) else f" A line marks {reference_name} at {level(reference)}."
    return Figure(
        svg=picture,
        caption=title,
        alt=f"{title}, bars of {len(rates)} rates in {unit}. {'; '.join(words) or 'No rates'}.{against}",
        table=Table(title, ["name", f"rate ({unit})", "interval", "note"], listed),
    )


def from_zero(values: NDArray[np.float64], left: float) -> Scale:
    """A scale that starts at zero and holds all finite values; up to one where there is nothing above zero."""
    highest = float(np.max(values, where=np.isfinite(values), initial=0.0))
    return fit_scale(np.array([0.0, highest if highest > LEAST else 1.0]), left, left + PLOT, num_ticks=5)


def side(x: float, to_x: Scale) -> str:
    """Text beside a line grows towards the middle of the plot, so that it stays inside."""
    share = (x - to_x.start) / (to_x.end - to_x.start)
    return "left" if share < 0.15 else "right" if share > 0.85 else "center"


def draw_scale(drawing: Canvas, to_x: Scale, bottom: float, unit: str) -> None:
    """Hairlines with their numbers below, a firmer line at zero."""
    for tick in to_x.ticks:
        color, thickness = (MUTED, 1.25) if tick == 0 else (RULE, 1)
        # A rectangle lies where it is drawn, under the bars; matplotlib puts every line above them.
        drawing.rectangle(to_x(tick) - thickness / 2, TOP, thickness, bottom + 4 - TOP, color)
        suffix = f" {unit}" if tick == to_x.ticks[-1] else ""
        drawing.text(to_x(tick), bottom + 16, f"{cell(tick)}{suffix}", size=11, align="center", color=MUTED)


def draw_bar(drawing: Canvas, rate: RateRow, to_x: Scale, y: float, shown: float) -> None:
    """The bar, its interval as a line with ends, and the numbers at the right."""
    start = to_x(0.0)
    if not is_missing(rate.value):
        for fill, alpha in ((GROUND, 1.0), (SERIES[0], 0.55)):
            drawing.rectangle(start, y - THICKNESS / 2, to_x(rate.value) - start, THICKNESS, fill, alpha)
    if not (is_missing(rate.low) or is_missing(rate.high)):
        low, high = to_x(max(rate.low, 0.0)), to_x(max(rate.high, 0.0))
        drawing.line([low, high], [y, y], INK, 1.5)
        for x in (low, high) if rate.low >= 0 else (high,):  # an interval over seeds may reach below zero
            drawing.line([x, x], [y - 4, y + 4], INK, 1.5)
    drawing.text(to_x.start - 12, y, rate.name, size=13, align="right", most=MOST_NAME)
    drawing.text(shown, y, rate.written, align="right")
    drawing.text(shown + 18, y, rate.note, color=MUTED, most=MOST_NOTE)
