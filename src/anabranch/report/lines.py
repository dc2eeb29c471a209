# SPDX-License-Identifier: Apache-2.0
"""Lines and dots: learning curves with their bands, and effects with their intervals against zero."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from anabranch.report.canvas import INK, MUTED, RULE, SERIES, Canvas, canvas, text_width
from anabranch.report.page import Figure, Table
from anabranch.report.text import MISSING, cell, estimate, interval, is_missing, points, shorten

MOST_POINTS, MOST_ROWS = 400, 40  # of a learning curve: drawn, and listed


class Scale(NamedTuple):
    """A linear map from values to pixels with its tick marks."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def fit_scale(
    values: NDArray[np.float64], start: float, end: float, *, num_ticks: int = 6, round_out: bool = True
) -> Scale:
    """A scale that holds all finite values; rounded out to whole ticks unless the data should fill the width."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    ticks = [float(tick) for tick in MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    if round_out:
        return Scale(ticks[0], ticks[-1], start, end, ticks)
    return Scale(low, high, start, end, [tick for tick in ticks if low <= tick <= high])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as possible to the wanted ones, in their order, at least `gap` apart and within low..high."""
    order = np.argsort(wanted, kind="stable")
    # Isotonic regression of the positions less their due gaps keeps crowded labels centred on their lines.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, many), (right, more) = blocks[-2:]
            blocks[-2:] = [[(left * many + right * more) / (many + more), many + more]]
    bases = [base for base, many in blocks for _ in range(int(many))]
    room = high - (len(order) - 1) * gap
    positions = [0.0] * len(order)
    for rank, (index, base) in enumerate(zip(order, bases, strict=True)):
        positions[index] = max(low, min(base, room)) + rank * gap
    return positions


def thin(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` evenly spaced indices of `count`, the first and the last among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(int))


@dataclass(frozen=True)
class Curve:
    """One line with its band; all four arrays have the same length."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def at(self, kept: NDArray[np.int64]) -> "Curve":
        return Curve(self.name, self.x[kept], self.y[kept], self.low[kept], self.high[kept])


def as_curve(name: str, x: ArrayLike, y: ArrayLike, low: ArrayLike | None, high: ArrayLike | None) -> Curve:
    x = np.array(x, dtype=float)
    parts = [np.full(x.shape, np.nan) if part is None else np.array(part, dtype=float) for part in (y, low, high)]
    if x.ndim != 1 or any(part.shape != x.shape for part in parts):
        raise ValueError(
            f"{name}: expected x, y, low, high of one length, received {[x.shape, *(p.shape for p in parts)]}"
        )
    return Curve(name, x, *parts)


def runs(known: NDArray[np.bool_]) -> Iterator[slice]:
    """The stretches without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]])))
    return (slice(start, stop) for start, stop in edges.reshape(-1, 2))


def draw_curve(drawing: Canvas, curve: Curve, to_x: Scale, to_y: Scale, index: int) -> None:
    color = SERIES[index % len(SERIES)]
    dashes = ((), (5, 3), (1.5, 2.5))[index // len(SERIES) % 3]
    for run in runs(np.isfinite(curve.x + curve.low + curve.high)):
        below = [(to_x(x), to_y(low)) for x, low in zip(curve.x[run], curve.low[run], strict=True)]
        above = [(to_x(x), to_y(high)) for x, high in zip(curve.x[run], curve.high[run], strict=True)]
        drawing.polygon([*below, *reversed(above)], color, 0.16)
    for run in runs(np.isfinite(curve.x + curve.y)):
        if run.stop - run.start == 1:
            drawing.dot(to_x(curve.x[run.start]), to_y(curve.y[run.start]), 2.5, color)
        drawing.line(to_x(curve.x[run]), to_y(curve.y[run]), color, 2, dashes)


def draw_axes(drawing: Canvas, to_x: Scale, to_y: Scale, x_label: str, y_label: str) -> None:
    """Hairlines across, numbers beside them, the labels at the ends of the axes."""
    for tick in to_y.ticks:
        drawing.line([to_x.start, to_x.end], [to_y(tick)] * 2, RULE)
        drawing.text(to_x.start - 10, to_y(tick), cell(tick), size=11, align="right", color=MUTED)
    for tick in to_x.ticks:
        drawing.line([to_x(tick)] * 2, [to_y.start, to_y.start + 4], MUTED)
        drawing.text(to_x(tick), to_y.start + 15, cell(tick), size=11, align="center", color=MUTED)
    drawing.text(0, 9, y_label, color=MUTED)
    drawing.text(to_x.end, to_y.start + 36, x_label, align="right", color=MUTED)


def label_ends(drawing: Canvas, curves: Sequence[Curve], to_x: Scale, to_y: Scale) -> None:
    """Each name beside the last value of its line, moved apart where lines end together."""
    ended = [(curve, np.flatnonzero(np.isfinite(curve.x + curve.y))) for curve in curves]
    ends = [(float(curve.x[known[-1]]), float(curve.y[known[-1]])) if known.size else None for curve, known in ended]
    wanted = [to_y(end[1]) if end else to_y.start for end in ends]
    for index, (curve, end, y) in enumerate(zip(curves, ends, spread(wanted, 16, to_y.end, to_y.start), strict=True)):
        color = SERIES[index % len(SERIES)]
        if end:
            drawing.dot(to_x(end[0]), to_y(end[1]), 3, color)
        name = curve.name if end else f"{shorten(curve.name, 26)} {MISSING}"
        drawing.text(to_x.end + 14, y, name, bold=True, color=color, most=28)


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None]],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """Learning curves: each name with its x, y and the low and high end of its band (None for no band)."""
    title = title or f"{y_label} by {x_label}"
    whole = [as_curve(name, *parts) for name, parts in series.items()]
    drawn = [curve.at(thin(len(curve.x), MOST_POINTS)) for curve in whole]
    width, height = 820, max(360, 16 * len(drawn) + 90)
    heights = np.concatenate([np.concatenate([c.y, c.low, c.high]) for c in drawn] or [np.array([])])
    widths = np.concatenate([curve.x for curve in drawn] or [np.array([])])
    to_y = fit_scale(heights, height - 50, 30)
    left = text_width([cell(tick) for tick in to_y.ticks], size=11) + 14
    right = text_width([f"{curve.name} {MISSING}" for curve in drawn], most=28, bold=True) + 16
    to_x = fit_scale(widths, left, width - right, round_out=False)
    with canvas(width, height) as drawing:
        draw_axes(drawing, to_x, to_y, x_label, y_label)
        for index, curve in enumerate(drawn):
            draw_curve(drawing, curve, to_x, to_y, index)
        label_ends(drawing, drawn, to_x, to_y)
        picture = drawing.svg()
    return Figure(picture, title, curves_alt(title, drawn), curves_table(title, x_label, whole))


def curves_alt(title: str, curves: Sequence[Curve]) -> str:
    known = {curve.name: curve.y[np.isfinite(curve.y)] for curve in curves}
    said = [
        f"{name} from {cell(y[0])} to {cell(y[-1])}" if y.size else f"{name} without values"
        for name, y in known.items()
    ]
    return f"{title}, lines of {len(curves)} series: {'; '.join(said)}."


def curves_table(title: str, x_label: str, curves: Sequence[Curve]) -> Table:
    """One row an x, one column a series; long curves are thinned and say so."""
    values = [{float(x): row for x, *row in zip(c.x, c.y, c.low, c.high, strict=True)} for c in curves]
    every_x = sorted({x for value in values for x in value if np.isfinite(x)})
    kept = [every_x[index] for index in thin(len(every_x), MOST_ROWS)] if every_x else []
    rows = [[x, *(with_band(*value.get(x, (None, None, None))) for value in values)] for x in kept]
    notes = [f"{len(kept)} of {len(every_x):,} points, evenly spaced."] if len(kept) < len(every_x) else []
    return Table(title, [x_label, *(curve.name for curve in curves)], rows, notes)


def with_band(value: float | None, low: float | None, high: float | None) -> str:
    between = "" if is_missing(low) and is_missing(high) else f" [{cell(low)}, {cell(high)}]"
    return f"{cell(value)}{between}"


class Effect(NamedTuple):
    """A difference with its interval, the number of samples behind it, and the verdict in a word."""

    label: str
    mean: float | None
    low: float | None
    high: float | None
    n: int | None
    verdict: str


VERDICT_COLORS = {"shown": SERIES[0], "hurts": SERIES[1]}
PLOT, MEAN, COUNT, VERDICT = 320, 482, 524, 542  # pixels from where the labels end
TOP, STEP = 30, 36


def forest(rows: Sequence[Effect], title: str, unit: str = "points") -> Figure:
    """Effects as dots with their intervals against zero, the verdict in words at the right."""
    effects = [Effect(*row) for row in rows]
    numbers = np.array([[effect.mean, effect.low, effect.high] for effect in effects], dtype=float)
    left = max(text_width([effect.label for effect in effects], size=13, most=52), 60) + 24
    to_x = fit_scale(np.append(numbers, 0.0), left, left + PLOT, num_ticks=5)
    verdicts = ["verdict", *(effect.verdict for effect in effects)]
    width = left + VERDICT + text_width(verdicts, size=13, most=16, bold=True)
    with canvas(width, TOP + STEP * len(effects) + 48) as drawing:
        draw_zero_line(drawing, to_x, TOP + STEP * len(effects), unit)
        for row, effect in enumerate(effects):
            draw_effect(drawing, effect, to_x, TOP + (row + 0.5) * STEP)
        picture = drawing.svg()
    columns = ["effect", f"mean ({unit})", "interval", "n", "verdict"]
    listed = [[e.label, points(e.mean), interval(e.low, e.high), e.n, e.verdict] for e in effects]
    said = "; ".join(f"{e.label}: {estimate(e.mean, e.low, e.high)}, {e.verdict}" for e in effects)
    return Figure(picture, title, f"{title}, in {unit}. {said or 'No effects'}.", Table(title, columns, listed))


def draw_zero_line(drawing: Canvas, to_x: Scale, bottom: float, unit: str) -> None:
    """Column heads, hairlines, and a stronger line at zero."""
    heads = {
        "effect": (0, "left"),
        "mean and interval": (MEAN, "right"),
        "n": (COUNT, "right"),
        "verdict": (VERDICT, "left"),
    }
    for name, (x, align) in heads.items():
        drawing.text(x and to_x.start + x, 10, name, size=11, align=align, color=MUTED)
    digits = tick_digits(to_x.ticks)
    for tick in to_x.ticks:
        x = to_x(tick)
        color, thickness = (MUTED, 1.25) if tick == 0 else (RULE, 1)
        drawing.line([x, x], [TOP, bottom + 4], color, thickness)
        drawing.text(x, bottom + 16, points(tick, digits), size=11, align="center", color=MUTED)
    drawing.text(to_x.end, bottom + 36, unit, size=11, align="right", color=MUTED)


def tick_digits(ticks: Sequence[float]) -> int:
    """As many decimals as the distance of the ticks needs."""
    return next((digits for digits in range(4) if all(round(t, digits) == round(t, 8) for t in ticks)), 4)


def draw_effect(drawing: Canvas, effect: Effect, to_x: Scale, y: float) -> None:
    left, color = to_x.start, VERDICT_COLORS.get(effect.verdict, INK)
    if not (is_missing(effect.low) or is_missing(effect.high)):
        drawing.line([to_x(effect.low), to_x(effect.high)], [y, y], color, 2)
    if not is_missing(effect.mean):
        drawing.dot(to_x(effect.mean), y, 5, color, halo=1.5)
    drawing.text(0, y, effect.label, size=13, most=52)
    drawing.text(left + MEAN, y, estimate(effect.mean, effect.low, effect.high), align="right")
    drawing.text(left + COUNT, y, cell(effect.n), align="right", color=MUTED)
    drawing.text(
        left + VERDICT, y, effect.verdict, size=13, bold=effect.verdict in VERDICT_COLORS, color=color, most=16
    )
