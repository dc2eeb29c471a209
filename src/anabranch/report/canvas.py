# SPDX-License-Identifier: Apache-2.0
"""A drawing surface in pixels whose colours belong to the page, so that one picture serves screen, dark mode and paper.

Matplotlib writes the SVG with reserved colours; each becomes a variable of the style sheet. Text stays text: it is
small, can be searched, and takes the font of the page. Only shapes and words are kept: no ids, links or metadata.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle

from anabranch.report.text import display_width, shorten

INK, MUTED, RULE, GAIN, HARM, GROUND = (f"#00010{index}" for index in range(6))
SERIES = tuple(f"#00020{index}" for index in range(6))
NAMES = ("ink", "muted", "rule", "gain", "harm", "ground", *(f"series-{index}" for index in range(1, 7)))
VARIABLES = {
    color: f"var(--{name})" for color, name in zip((INK, MUTED, RULE, GAIN, HARM, GROUND, *SERIES), NAMES, strict=True)
}

STYLE = {"svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "path.simplify": True}
KEPT = ("d", "x", "y")
CHARACTER = 0.61  # mean width of a character relative to the type size, in a wide font


class Canvas:
    """Pixels from the top left corner; draw, then take `svg()`."""

    def __init__(self, width: float, height: float):
        self.width, self.height = round(width), round(height)
        self.figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0))

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, alpha: float = 1.0) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, alpha=alpha, linewidth=0, clip_on=False))

    def outline(self, x: float, y: float, width: float, height: float, color: str, thickness: float = 1.5) -> None:
        self.axes.add_patch(
            Rectangle((x, y), width, height, facecolor="none", edgecolor=color, linewidth=thickness, clip_on=False)
        )

    def polygon(self, corners: Sequence[tuple[float, float]], fill: str, alpha: float) -> None:
        self.axes.add_patch(Polygon(corners, facecolor=fill, alpha=alpha, linewidth=0, clip_on=False))

    def dot(self, x: float, y: float, radius: float, color: str, halo: float = 0.0) -> None:
        edge = GROUND if halo else "none"
        self.axes.add_patch(Circle((x, y), radius, facecolor=color, edgecolor=edge, linewidth=halo, clip_on=False))

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        color: str,
        thickness: float = 1.0,
        dashes: Sequence[float] = (),
    ) -> None:
        style = (0, tuple(dashes)) if dashes else "solid"
        self.axes.plot(
            xs, ys, color=color, linewidth=thickness, linestyle=style, clip_on=False, scalex=False, scaley=False
        )

    def text(
        self,
        x: float,
        y: float,
        text: object,
        *,
        size: float = 12,
        align: str = "left",
        color: str = INK,
        bold: bool = False,
        most: int = 80,
    ) -> None:
        """Write one line whose middle is at `y`, shortened to `most` characters."""
        weight = "bold" if bold else "normal"
        baseline = y + 0.35 * size
        shown = shorten(text, most)
        self.axes.text(x, baseline, shown, fontsize=size, ha=align, va="baseline", color=color, weight=weight)

    def svg(self) -> Markup:
        drawn = StringIO()
        self.figure.savefig(drawn, format="svg", transparent=True)
        picture = ElementTree.Element("svg", viewBox=f"0 0 {self.width} {self.height}", style=f"--width:{self.width}px")
        for element in ElementTree.fromstring(drawn.getvalue()).iter():
            kind = element.tag.rpartition("}")[2]
            if kind in ("path", "text") and (style := page_style(element.get("style", ""))):
                kept = {name: short_numbers(element.attrib[name]) for name in KEPT if name in element.attrib}
                ElementTree.SubElement(picture, kind, kept | {"style": style}).text = (element.text or "").strip()
        return Markup(ElementTree.tostring(picture, encoding="unicode"))


@contextmanager
def canvas(width: float, height: float) -> Iterator[Canvas]:
    """A canvas under matplotlib's own defaults: a user's matplotlibrc must not change the report."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        # Matplotlib measures text in its own font, which lacks most scripts; the reader's browser has them.
        warnings.simplefilter("ignore", UserWarning)
        yield Canvas(width, height)


def text_width(lines: Iterable[object], size: float = 12, most: int = 80, bold: bool = False) -> float:
    """Pixels to set aside for the widest of these lines, whatever font the reader has."""
    widest = max((display_width(shorten(line, most)) for line in lines), default=0)
    return widest * size * CHARACTER * (1.12 if bold else 1)


def page_style(style: str) -> str:
    """The declarations that show, with colours of the page and without fonts; empty for what is invisible."""
    declarations = [tuple(part.split(": ", 1)) for part in style.split("; ") if ": " in part]
    shown = {name: VARIABLES.get(value, value) for name, value in declarations if name != "font-family"}
    if shown.get("fill") == "none" and "stroke" not in shown:
        return ""
    return ";".join(f"{name}:{value}" for name, value in shown.items())


def short_numbers(value: str) -> str:
    """Two decimals of a pixel are plenty; line breaks inside paths are not needed."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(rounded.split())
