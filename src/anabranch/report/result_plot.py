# SPDX-License-Identifier: Apache-2.0
"""The figures of `Result.plot()`: ordinary matplotlib, made without pyplot, so that no global state is touched."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from anabranch.report.text import MISSING, is_numeric, shorten

if TYPE_CHECKING:
    from anabranch.report.result import Result

INK, LINE, MUTED = "#1d2226", "#0b6a88", "#8a9299"
PANEL, STEP, MARGIN = 3.4, 0.34, 1.3  # inches: a panel's width, a row's height, what title and axis take
LETTER, MOST_NAME = 0.075, 60


def intervals(result: "Result") -> Figure:
    """A panel a column of estimates, in it a point with its interval a row; a line at zero for differences."""
    labels = row_labels(result)
    count = len(result.numeric)
    left = 0.4 + LETTER * max(map(len, labels))
    figure = Figure(figsize=(left + PANEL * count, MARGIN + STEP * len(labels)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, result.numeric, strict=True):
        cells = [row[column] for row in result.rows]
        for place, one in enumerate(cells):
            draw_point(axes, place, one)
        if any(one.signed for one in cells):
            axes.axvline(0, color=MUTED, linewidth=1, zorder=0)
        axes.set_xlabel(result.columns[column])
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(labels)), labels, parse_math=False)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)  # the first row on top
    figure.suptitle(result.caption, x=0.01, ha="left", fontsize="medium", parse_math=False)
    return figure


def draw_point(axes: Any, place: int, one: Any) -> None:
    if one.value is None:
        return
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [place, place], color=LINE, linewidth=1.5)
    axes.plot([one.value], [place], "o", color=LINE, markersize=5)


def row_labels(result: "Result") -> list[str]:
    """The words before the first column of estimates, without plain numbers."""
    first = result.numeric[0]
    return [
        shorten(" · ".join(text for text in texts[:first] if not is_numeric(text)) or texts[0], MOST_NAME)
        for texts in result.texts
    ]


def matrix(result: "Result") -> Figure:
    """A map with the number of every cell in it; blue above zero, orange below, for levels blue alone."""
    cells = [[row[column] for column in result.numeric] for row in result.rows]
    values = np.array([[np.nan if one.value is None else one.value for one in row] for row in cells], dtype=float)
    signed = any(one.signed for row in cells for one in row)
    most = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0)) or 1.0
    figure = Figure(figsize=(2.4 + 0.95 * len(cells[0]), MARGIN + 0.5 * len(cells)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="RdBu" if signed else "Blues", vmin=-1.8 * most if signed else 0, vmax=1.8 * most,
                aspect="auto")  # fmt: skip
    for row, several in enumerate(cells):
        for column, one in enumerate(several):
            number = MISSING if one.value is None else str(one._replace(low=None, high=None))
            clear = one.low is not None and one.high is not None and one.signed and (one.low > 0 or one.high < 0)
            weight = "bold" if clear else "normal"
            axes.text(column, row, number, ha="center", va="center", color=INK, fontsize="small", fontweight=weight)
    axes.set_xticks(range(len(cells[0])), [result.columns[i] for i in result.numeric], parse_math=False)
    axes.set_yticks(range(len(cells)), row_labels(result), parse_math=False)
    figure.suptitle(result.caption, x=0.01, ha="left", fontsize="medium", parse_math=False)
    return figure
