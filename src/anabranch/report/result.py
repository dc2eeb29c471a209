# SPDX-License-Identifier: Apache-2.0
"""What a job hands back in Python: the numbers of its file, and tables of them that print, show and draw themselves.

result = anabranch.results("runs/measure")
print(result)                   # the tables, as Markdown; a notebook shows them by itself
result.table("verdicts")        # one of them as Markdown
result.plot()                   # a matplotlib figure; nothing global is touched
result["tasks"][0]["gap_own"]   # the numbers themselves: it is the dictionary of the run's file
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from markupsafe import Markup

from anabranch.errors import UsageError, did_you_mean
from anabranch.report.page import Table
from anabranch.report.text import cell, estimate, inert, is_numeric, level, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

NUMBERLESS = "a column of numbers"


class Estimate(NamedTuple):
    """A number with its 95 % interval, or without one; a difference is written with its sign."""

    value: float | None
    low: float | None = None
    high: float | None = None
    signed: bool = True
    digits: int = 1

    def __str__(self) -> str:
        return estimate(self.value, self.low, self.high, self.digits, points if self.signed else level)

    @classmethod
    def of(cls, found: Mapping[str, Any] | None, signed: bool = True, scale: float = 1.0) -> "Estimate":
        """From {mean, rate or difference, low, high}; nothing where there is none."""
        if found is None:
            return cls(None, signed=signed)
        middle = next(found[name] for name in ("mean", "rate", "difference") if name in found)
        ends = (None if end is None else scale * end for end in (middle, found.get("low"), found.get("high")))
        return cls(*ends, signed=signed)


@dataclass(frozen=True)
class Result:
    """One table: rows under columns, some of its cells an Estimate."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    layout: Literal["rows", "matrix"] = "rows"
    """How it is drawn: intervals beside each other, or a coloured map whose first column names the rows."""

    def __post_init__(self):
        Table(self.caption, self.columns, self.rows)  # as many cells a row as columns
        if self.layout not in ("rows", "matrix"):
            raise ValueError(f"layout: expected rows or matrix, received {self.layout!r}")

    @property
    def texts(self) -> list[list[str]]:
        return [[inert(written(value)) for value in row] for row in self.rows]

    def table(self) -> str:
        """As Markdown, the caption above and the notes below."""
        lines = [list(map(str, self.columns)), ["---"] * len(self.columns), *self.texts]
        body = "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines)
        return "\n\n".join([f"**{in_markdown(self.caption)}**", body, *map(in_markdown, self.notes)])

    __str__ = table

    def _repr_html_(self) -> str:
        """As a table for a notebook; every text is escaped."""
        head = Markup("").join(Markup("<th>{}</th>").format(column) for column in self.columns)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(in_html(text, i == 0) for i, text in enumerate(row)))
            for row in self.texts
        )
        notes = Markup("").join(Markup("<p>{}</p>").format(note) for note in self.notes)
        page = Markup("<table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}")
        return str(page.format(self.caption, head, body, notes))

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(title=self.caption)
        for i, column in enumerate(self.columns):
            numeric = all(is_numeric(row[i]) for row in self.texts)
            shown.add_column(Text(str(column)), justify="right" if numeric else "left")
        for row in self.texts:
            shown.add_row(*map(Text, row))  # Text: a label in brackets is no markup
        return shown

    @property
    def numeric(self) -> list[int]:
        """The columns that can be drawn."""
        columns = enumerate(zip(*self.rows, strict=True))
        return [i for i, column in columns if all(isinstance(value, Estimate) for value in column)]

    def plot(self) -> "Drawing":
        """A matplotlib figure of the columns that carry estimates.

        Raises:
            UsageError: no column does.
        """
        if not self.numeric:
            raise UsageError(f"{self.caption} cannot be drawn", expected=NUMBERLESS, received=", ".join(self.columns))
        from anabranch.report import result_plot  # matplotlib is loaded once something is drawn

        return (result_plot.matrix if self.layout == "matrix" else result_plot.intervals)(self)


class Results(dict[str, Any]):
    """The numbers of one job as its file holds them, and `tables`: the same by name, ready to be read."""

    def __init__(self, numbers: Mapping[str, Any], tables: Mapping[str, Result]):
        super().__init__(numbers)
        self.tables = dict(tables)

    def named(self, name: str) -> Result:
        if name not in self.tables:
            raise UsageError(f"there is no table {name!r}", hint=did_you_mean(name, self.tables))
        return self.tables[name]

    def table(self, name: str | None = None) -> str:
        """A table as Markdown; the first one without a name."""
        return self.named(name or next(iter(self.tables))).table()

    def plot(self, name: str | None = None) -> "Drawing":
        """A matplotlib figure of a table; of the first that has estimates without a name."""
        drawable = [key for key, table in self.tables.items() if table.numeric]
        return self.named(name or next(iter(drawable or self.tables))).plot()

    def __str__(self) -> str:
        return "\n\n".join(table.table() for table in self.tables.values())

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in self.tables.values())


def written(value: object) -> str:
    return str(value if isinstance(value, Estimate) else cell(value))


def in_markdown(text: str) -> str:
    """One line in which nothing ends a cell or begins a tag."""
    return re.sub(r"([\\|<])", r"\\\1", " ".join(text.split()))


def in_html(text: str, first: bool) -> Markup:
    if first:
        return Markup('<th scope="row" style="text-align:left">{}</th>').format(text)
    align = "right" if is_numeric(text) else "left"
    return Markup('<td style="text-align:{}">{}</td>').format(align, text)
