# SPDX-License-Identifier: Apache-2.0
"""Take the README's four pictures out of the demos' pages: python scripts/pictures.py runs/demo

A picture is a figure of a page, with the page's colours, so that it can stand alone in light and in dark.
"""

import re
import sys
from html import unescape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURES, STYLE = ROOT / "docs" / "pictures", ROOT / "src" / "anabranch" / "report" / "style.css"
WANTED = {
    "transfer": "Points gained over the shared model",
    "erase": "Pictures with the mark",
    "align": "What a small step",
    "experts": "From text to expert",
}
"""Of each demo, how the caption of the figure begins."""


def figures(page: str) -> dict[str, str]:
    """SVG of the first picture of every figure, by caption."""
    found = {}
    for figure in re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL):
        caption = re.search(r"<figcaption[^>]*>(.*?)</figcaption>", figure, flags=re.DOTALL)
        drawn = re.search(r"<svg.*?</svg>", figure, flags=re.DOTALL)
        if caption and drawn:
            found[unescape(re.sub(r"<[^>]+>", "", caption[1])).strip()] = drawn[0]
    return found


def alone(svg: str, caption: str, colours: str) -> str:
    """The picture with the colours that the page's style sheet has for it, on a ground of its own."""
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -12 {float(width) + 24:g} {float(height) + 24:g}">'
    style = f"<style>{colours}\nsvg {{ font-family: var(--sans); }}\n</style>"
    ground = '<rect x="-12" y="-12" width="100%" height="100%" fill="var(--ground)"/>'
    return "\n".join([head, f"<title>{caption}</title>", style, ground, re.sub(r"^<svg[^>]*>", "", svg)]) + "\n"


def main(run: Path) -> int:
    colours = re.match(r":root \{.*?\n\}\n@media screen.*?\n\}\n", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)[
        0
    ]
    PICTURES.mkdir(exist_ok=True)
    for topic, begins in WANTED.items():
        found = figures((run / topic / "report.html").read_text(encoding="utf-8"))
        chosen = next((caption for caption in found if caption.startswith(begins)), None)
        if chosen is None:
            print(f"{topic}: no figure begins with {begins!r}; there are: {'; '.join(found)}")
            return 3
        (PICTURES / f"{topic}.svg").write_text(alone(found[chosen], chosen, colours), encoding="utf-8")
        print(f"{topic}.svg: {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
