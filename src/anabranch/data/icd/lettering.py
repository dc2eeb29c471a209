# SPDX-License-Identifier: Apache-2.0
"""Words and badges as masks, drawn with the DejaVu fonts that come with matplotlib.

Shapes    : masks are (H, W) float32 in 0..1, cut to what is drawn with its edge.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
WORDS = (
    *("about", "again", "always", "autumn", "better", "bread", "bright", "city", "coffee", "corner", "daily", "early"),
    *("easy", "evening", "every", "first", "fresh", "garden", "good", "great", "green", "guide", "happy", "home"),
    *("house", "ideas", "journey", "kitchen", "lake", "later", "light", "little", "local", "market", "moment"),
    *("more", "morning", "never", "new", "north", "notes", "open", "paper", "park", "people", "place", "quiet"),
    *("real", "river", "road", "season", "simple", "slow", "small", "spring", "story", "street", "summer", "today"),
    *("travel", "walk", "water", "week", "winter", "world", "yellow", "your"),
)


class Masks(NamedTuple):
    fill: np.ndarray
    edge: np.ndarray
    """The fill and a rim around it, as wide as `rim`."""


def face(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # Basic layout: what another machine has installed for complex scripts must not move a letter.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def words(text: str, font: ImageFont.FreeTypeFont, rim: int) -> Masks:
    """One or more lines, centred."""
    lines, pitch = text.split("\n"), round(1.2 * font.size)
    room = font.size + rim  # around the baselines, enough for any letter; what stays empty is cut off
    size = (int(max(map(font.getlength, lines))) + 2 * room, pitch * (len(lines) - 1) + 3 * room)

    def paint(draw: ImageDraw.ImageDraw, rim: int) -> None:
        for row, line in enumerate(lines):
            # Not multiline_text, which moves the lines apart by the rim, so that fill and rim would not match.
            baseline = (size[0] // 2, 2 * room + row * pitch)
            draw.text(baseline, line, fill=255, font=font, anchor="ms", stroke_width=rim)

    return cut(*(canvas(size, paint, width) for width in (0, rim)))


def badge(letter: str, size: int, font_name: str, rim: int) -> Masks:
    """A letter in a circle."""
    font, line = face(font_name, max(1, round(0.55 * size))), max(1, size // 14)
    side = size + 2 * rim + 2

    def paint(draw: ImageDraw.ImageDraw, rim: int) -> None:
        outer = (side - size) / 2 - rim
        draw.ellipse((outer, outer, side - 1 - outer, side - 1 - outer), outline=255, width=line + 2 * rim)
        draw.text((side / 2, side / 2), letter, fill=255, font=font, anchor="mm", stroke_width=rim)

    return cut(*(canvas((side, side), paint, width) for width in (0, rim)))


def beside(left: Masks, right: Masks, gap: int) -> Masks:
    """Both on one line, their middles at the same height."""
    height = max(len(left.fill), len(right.fill))

    def joined(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.hstack([tall(one, height), np.zeros((height, gap), np.float32), tall(two, height)])

    return cut(*map(joined, left, right))


def tall(mask: np.ndarray, height: int) -> np.ndarray:
    above = (height - len(mask)) // 2
    return np.pad(mask, ((above, height - len(mask) - above), (0, 0)))


def turned(masks: Masks, degrees: float) -> Masks:
    def turn(mask: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.round(mask * 255).astype(np.uint8))
        return np.asarray(picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True), dtype=np.float32) / 255

    return cut(*map(turn, masks))


def canvas(size: tuple[int, int], paint: Callable[[ImageDraw.ImageDraw, int], None], rim: int) -> np.ndarray:
    picture = Image.new("L", size)
    paint(ImageDraw.Draw(picture), rim)
    return np.asarray(picture, dtype=np.float32) / 255


def cut(fill: np.ndarray, edge: np.ndarray) -> Masks:
    """Without empty rows and columns around."""
    both = np.maximum(fill, edge)
    rows, columns = np.flatnonzero(both.any(1)), np.flatnonzero(both.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Masks(fill[window], both[window])
