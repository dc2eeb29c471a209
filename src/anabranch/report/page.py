# SPDX-License-Identifier: Apache-2.0
"""The one page that a run ends with: plain records of what it says, and the HTML that says it.

The page is a single file for any browser: no scripts, no network, light and dark, screen and paper. A content security
policy inside it forbids what it does not need, so a hostile label could do nothing even if it got past the escaping.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from anabranch import __version__
from anabranch.report.text import cell, inert, is_numeric

BESIDE = re.compile(r"[\w.-]+(/[\w.-]+)*")
"""A relative file: no scheme, no other host, no way up."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: expected {len(self.columns)} cells as in {self.columns}, received {row}")

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its cells are numbers."""
        return [all(is_numeric(value) for value in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Figure:
    """A picture, what it says in words, and its data."""

    svg: Markup
    caption: str
    alt: str
    table: Table
    notes: Sequence[str] = ()
    """How to read the picture, printed under it."""

    def __post_init__(self):
        if not self.alt.strip():
            raise ValueError(f"alt: expected a sentence that stands for the picture, received {self.alt!r}")
        refuse_text(notes=self.notes)


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    kind: Literal["plain", "caution", "detail"] = "plain"
    """A caution is set off at the margin; a detail starts folded."""
    links: Sequence[tuple[str, str]] = ()
    """(words, file) of pages that lie beside this one or in folders under it."""

    def __post_init__(self):
        refuse_text(text=self.text, links=self.links)
        for words, file in self.links:
            if not BESIDE.fullmatch(file) or ".." in file.split("/"):
                raise ValueError(f"links: expected a file beside the page for {words!r}, received {file!r}")
        if self.kind not in ("plain", "caution", "detail"):
            raise ValueError(f"kind: expected plain, caution or detail, received {self.kind!r}")


@dataclass(frozen=True)
class Page:
    title: str
    lead: Sequence[str]
    """The verdict in sentences; the first one is set large."""
    facts: Sequence[tuple[str, object]] = ()
    sections: Sequence[Section] = ()

    def __post_init__(self):
        refuse_text(lead=self.lead)


def refuse_text(**fields: object) -> None:
    """A lone string where sentences are expected would print one letter a line."""
    for name, value in fields.items():
        if isinstance(value, str):
            raise ValueError(f"{name}: expected a list of sentences, received one string {value[:40]!r}")


@cache
def template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    return environment.get_template("template.html.jinja")


def render(page: Page) -> str:
    """The whole page; the same page gives the same bytes."""
    return inert(template().render(page=page, version=__version__)) + "\n"


def write(page: Page, path: str | Path) -> Path:
    """Put the page at `path` in one step: a reader sees the old page or the new one, never a part."""
    path = Path(path)
    html = render(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def standalone(figure: Figure) -> str:
    """The picture as a file of its own, with the page's colours; for places that show an image and no page."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    colours = "".join(line for line in style.partition("}")[0].partition("{")[2].splitlines() if "--" in line)
    head = f"<style>svg {{{colours} background: var(--ground); font-family: var(--sans); }}</style>"
    return str(figure.svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{head}", 1)
