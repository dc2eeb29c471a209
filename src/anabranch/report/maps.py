# SPDX-License-Identifier: Apache-2.0
"""Coloured maps: transfer between domains, and which expert takes which domain."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from anabranch.report.canvas import CHARACTER, GAIN, HARM, INK, MUTED, RULE, Canvas, canvas, text_width
from anabranch.report.page import Figure, Table
from anabranch.report.text import MISSING, cell, estimate, excludes, interval, is_missing, level, points

STRONGEST = 0.8  # opacity of the most extreme cell: type on it stays readable in light and dark


def array(values: ArrayLike | None, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    """Numbers of a known shape; None and the infinities become NaN, as does a missing array."""
    numbers = np.full(shape, np.nan) if values is None else np.array(values, dtype=float)
    if numbers.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, received {numbers.shape}")
    return np.where(np.isfinite(numbers), numbers, np.nan)


class Cell(NamedTuple):
    shown: str
    below: str = ""
    fill: str = RULE
    alpha: float = 0.0
    bold: bool = False
    outlined: bool = False


def grid(
    cells: Sequence[Sequence[Cell]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str = "",
    corner: str = "",
    above: str = "",
    width: float = 86,
    height: float = 50,
) -> Markup:
    """Named rows and columns of coloured cells with one or two lines of text in each."""
    left = max(text_width(row_names, most=22), text_width([corner], size=11, most=22)) + 12
    most = int(width / (12 * CHARACTER))
    title_height = 30 if title else 0
    top = title_height + (20 if above else 0) + 24
    body = max(width * len(column_names), text_width([title], size=13.5, bold=True), text_width([above], size=11))
    with canvas(left + body + 4, top + height * len(row_names) + 4) as drawing:
        drawing.text(left, 12, title, size=13.5, bold=True)
        drawing.text(left, title_height + 8, above, size=11, color=MUTED)
        drawing.text(left - 10, top - 12, corner, size=11, align="right", color=MUTED, most=22)
        for column, name in enumerate(column_names):
            drawing.text(left + (column + 0.5) * width, top - 12, name, align="center", most=most)
        for row, name in enumerate(row_names):
            y = top + row * height
            drawing.text(left - 10, y + height / 2, name, align="right", most=22)
            for column, one in enumerate(cells[row]):
                x = left + column * width
                draw_cell(drawing, one, x + 1, y + 1, width - 2, height - 2)
        return drawing.svg()


def draw_cell(drawing: Canvas, one: Cell, x: float, y: float, width: float, height: float) -> None:
    middle = y + height / 2
    if one.shown != MISSING:
        drawing.outline(x + 0.5, y + 0.5, width - 1, height - 1, RULE, 1)
    if one.alpha:
        drawing.rectangle(x, y, width, height, one.fill, one.alpha)
    if one.outlined:
        drawing.outline(x + 1, y + 1, width - 2, height - 2, INK)
    size = 14 if one.below else 12
    drawing.text(x + width / 2, middle - (8 if one.below else 0), one.shown, size=size, align="center", bold=one.bold)
    drawing.text(x + width / 2, middle + 10, one.below, size=10, align="center")


@dataclass(frozen=True)
class Matrix:
    """Values (R, C) with the ends of their intervals, under a title of their own."""

    title: str
    values: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None

    def stacked(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        """Values, low and high ends as one array (3, R, C)."""
        parts = {"values": self.values, "low": self.low, "high": self.high}
        return np.stack([array(part, shape, name) for name, part in parts.items()])


class Frame(NamedTuple):
    """What the maps of one figure share."""

    row_names: Sequence[str]
    column_names: Sequence[str]
    row_title: str
    column_title: str
    unit: str
    center: float

    @property
    def write(self) -> Callable[[object, int], str]:
        """Differences carry their sign, levels do not."""
        return points if self.center == 0 else level


def matrix(
    values: ArrayLike,
    low: ArrayLike | None,
    high: ArrayLike | None,
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    unit: str = "points",
    center: float = 0.0,
    *,
    row_title: str = "",
    column_title: str = "",
) -> Figure:
    """A diverging map (R, C) around the centre; a domain's own cell (same row and column name) is outlined."""
    frame = Frame(row_names, column_names, row_title, column_title, unit, center)
    return draw_maps([Matrix("", values, low, high)], title, frame)


def two_matrices(
    left: Matrix,
    right: Matrix,
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    unit: str = "points",
    center: float = 0.0,
    *,
    row_title: str = "",
    column_title: str = "",
) -> Figure:
    """Two diverging maps with one colour scale, for example the shared model and the routed one."""
    frame = Frame(row_names, column_names, row_title, column_title, unit, center)
    return draw_maps([left, right], title, frame)


def draw_maps(panels: Sequence[Matrix], title: str, frame: Frame) -> Figure:
    shape = (len(frame.row_names), len(frame.column_names))
    numbers = [panel.stacked(shape) for panel in panels]
    scale = max(reach(values - frame.center) for values, _, _ in numbers)
    pictures = [draw_map(panel.title, ends, frame, scale) for panel, ends in zip(panels, numbers, strict=True)]
    said = [
        f"{panel.title or title}, {shape[0]} rows by {shape[1]} columns, in {frame.unit}. {extremes(ends[0], frame)}"
        for panel, ends in zip(panels, numbers, strict=True)
    ]
    several = len(panels) > 1
    rows = [
        [*([panel.title] if several else []), name, *(estimate(*cell_ends, write=frame.write) for cell_ends in row.T)]
        for panel, ends in zip(panels, numbers, strict=True)
        for name, row in zip(frame.row_names, ends.transpose(1, 0, 2), strict=True)
    ]
    columns = [*(["model"] if several else []), frame.row_title or "row", *frame.column_names]
    return Figure(
        svg=Markup('<div class="row">{}</div>{}').format(Markup("").join(pictures), ramp(scale, frame)),
        caption=title,
        alt=" ".join(said),
        table=Table(title, columns, rows),
        notes=[map_key(frame)],
    )


def draw_map(title: str, ends: NDArray[np.float64], frame: Frame, scale: float) -> Markup:
    """One map from values, low and high ends stacked (3, R, C)."""
    cells = [
        [
            diverging_cell(*ends[:, row, column], own=name == other, frame=frame, scale=scale)
            for column, other in enumerate(frame.column_names)
        ]
        for row, name in enumerate(frame.row_names)
    ]
    names = frame.row_names, frame.column_names
    width = max(86, text_width([one.below for row in cells for one in row], size=10) + 2)
    return grid(cells, *names, title=title, corner=frame.row_title, above=frame.column_title, width=width)


def diverging_cell(value: float, low: float, high: float, own: bool, frame: Frame, scale: float) -> Cell:
    if is_missing(value):
        return Cell(MISSING, outlined=own)
    clear = excludes(low, high, frame.center)
    between = interval(low, high, write=frame.write)
    return Cell(
        shown=frame.write(value, 1) + "*" * clear,
        below="" if between == MISSING else between,
        fill=GAIN if value > frame.center else HARM,
        alpha=round(STRONGEST * abs(value - frame.center) / scale, 3),
        bold=clear,
        outlined=own,
    )


def reach(distances: NDArray[np.float64]) -> float:
    """The largest distance from the centre, where the colour scale ends; 1 if there is none."""
    return float(np.max(np.abs(distances), where=np.isfinite(distances), initial=0.0)) or 1.0


def ramp(scale: float, frame: Frame) -> Markup:
    """The colour scale as one line below the map."""
    low, high = (frame.write(frame.center + end, 1) for end in (-scale, scale))
    orange, blue = (f"color-mix(in srgb, var(--{name}) {STRONGEST:.0%}, var(--ground))" for name in ("harm", "gain"))
    gradient = f"background:linear-gradient(90deg, {orange}, var(--ground), {blue})"
    return Markup('<div class="ramp">{} <i style="{}"></i> {} {}</div>').format(low, gradient, high, frame.unit)


def extremes(values: NDArray[np.float64], frame: Frame) -> str:
    """The highest and the lowest value in words, for readers who do not see the picture."""
    if not np.isfinite(values).any():
        return "No cell has a value."
    phrases = []
    for word, place in (("Highest", np.nanargmax(values)), ("Lowest", np.nanargmin(values))):
        row, column = divmod(int(place), values.shape[1])
        phrases.append(
            f"{word}: {frame.write(values[row, column], 1)} at {frame.row_names[row]}, {frame.column_names[column]}."
        )
    return " ".join(phrases)


def map_key(frame: Frame) -> str:
    center = cell(frame.center)
    key = f"Differences in {frame.unit}." if frame.center == 0 else f"In {frame.unit}, coloured around {center}."
    own = " Outlined: a domain's own cell." if set(frame.row_names) & set(frame.column_names) else ""
    return f"{key} Bold with a star: the interval leaves out {center}.{own}"


def loads(
    load: ArrayLike | Mapping[object, ArrayLike],
    domain_names: Sequence[str],
    title: str,
    *,
    expert_names: Sequence[str] | None = None,
) -> Figure:
    """For each layer (E, domains) the share of each domain's tokens that goes to each expert; columns sum to one."""
    layers = load if isinstance(load, Mapping) else dict(enumerate(np.asarray(load, dtype=float)))
    shares = {f"layer {layer}": np.array(share, dtype=float) for layer, share in layers.items()}
    scale = max((reach(share) for share in shares.values()), default=1.0)
    pictures, rows, alt = [], [], []
    for layer, share in shares.items():
        names = expert_names or [f"expert {expert}" for expert in range(len(share))]
        share = array(share, (len(names), len(domain_names)), layer)
        if (share < 0).any():
            raise ValueError(f"{layer}: expected shares of at least 0, received {np.nanmin(share)}")
        cells = [[load_cell(value, scale) for value in row] for row in share]
        pictures.append(grid(cells, names, domain_names, title=layer, width=74, height=30))
        rows += [[layer, name, *map(percent, row)] for name, row in zip(names, share, strict=True)]
        alt.append(f"{layer}: {len(names)} experts by {len(domain_names)} domains.")
    sizes = {len(share) for share in shares.values()}
    fair = f" An even split would put {100 / sizes.pop():.0f} in every cell." if len(sizes) == 1 else ""
    return Figure(
        svg=Markup('<div class="row">{}</div>').format(Markup("").join(pictures)),
        caption=title,
        alt=f"{title}. Share of each domain's tokens by expert. {' '.join(alt)}",
        table=Table(title, ["layer", "expert", *domain_names], rows),
        notes=[f"Percent of the domain's tokens that the expert receives.{fair}"],
    )


def percent(share: float) -> str:
    return MISSING if is_missing(share) else f"{100 * share:.0f}"


def load_cell(share: float, scale: float) -> Cell:
    return Cell(percent(share), fill=GAIN, alpha=0.0 if is_missing(share) else round(STRONGEST * share / scale, 3))
