# SPDX-License-Identifier: Apache-2.0
"""Mark `watermark`: a name, a badge or both, seen through, once or all over the picture.

Size      : width U(0.25, 0.6) of the image's, at least 32 pixels; half of that where tiled.
Place     : bottom right 50 %; centre 25 %, half of them turned; tiled 25 %, turned, with a box for every tile.
Turned    : by U(-30, 30) degrees.
Opacity   : U(0.25, 0.6).
"""

import math
from dataclasses import dataclass

import numpy as np

from anabranch.data import marks
from anabranch.data.icd import lettering
from anabranch.data.icd.lettering import FACES, WORDS, Masks
from anabranch.data.icd.look import Look, Range, refuse_patch_settings
from anabranch.data.marks import Glyph, Layer, Placed

SIZE, OPACITY = (0.25, 0.6), (0.25, 0.6)
LEAST_WIDTH, LEAST_SIDE, TURN = 32, 64, 30
MOST_OF_SIDE = 0.9
TRADES = ("Studio", "Images", "Photo", "Archive", "Pictures", "Media")
STAMPS = ("SAMPLE", "PREVIEW", "PROOF", "DRAFT", "DO NOT COPY")
TRIAL = 100
"""Letters of this many pixels tell how wide a mark gets with others."""


@dataclass(frozen=True, kw_only=True)
class Design:
    text: str
    letter: str
    """Of the badge; no badge where it is empty."""
    font_name: str
    light: bool


def check(look: Look) -> None:
    refuse_patch_settings(look, "watermark")


def opacity(look: Look) -> Range:
    return look.opacity or OPACITY


def least_side(look: Look) -> int:
    return LEAST_SIDE


def draw(height: int, width: int, look: Look, generator: np.random.Generator) -> list[Placed]:
    design = invent(generator)
    share = generator.uniform(*(look.size or SIZE))
    where = str(generator.choice(("bottom right", "centre", "tiled"), p=(0.5, 0.25, 0.25)))
    degrees = generator.uniform(-TURN, TURN)
    if where == "bottom right" or (where == "centre" and generator.random() < 0.5):
        degrees = 0.0
    target = max(LEAST_WIDTH, share * width * (0.5 if where == "tiled" else 1))
    mark = coloured(rendered(design, target, degrees, (height, width)), design)
    if where == "tiled":
        return tiles(mark, height, width, generator)
    x, y = place(height, width, mark, generator, where)
    return [Placed(mark, x, y)]


def invent(generator: np.random.Generator) -> Design:
    name, trade, stamp = (str(generator.choice(of)) for of in (WORDS, TRADES, STAMPS))
    kind = str(generator.choice(("name", "stamp", "badge", "both"), p=(0.35, 0.25, 0.15, 0.25)))
    owner = f"{'© ' if generator.random() < 0.5 else ''}{name.title()} {trade}"
    text = {"name": owner, "stamp": stamp, "badge": "", "both": f"{name.title()} {trade}"}[kind]
    letter = name[0].upper() if kind in ("badge", "both") else ""
    return Design(
        text=text, letter=letter, font_name=str(generator.choice(FACES)), light=bool(generator.random() < 0.75)
    )


def rendered(design: Design, target: float, degrees: float, room: tuple[int, int]) -> Masks:
    """As wide as `target` before it is turned, smaller where it would not fit the room."""
    height, width = outline(design, TRIAL).edge.shape
    radians = math.radians(abs(degrees))
    turned_width = width * math.cos(radians) + height * math.sin(radians)
    turned_height = height * math.cos(radians) + width * math.sin(radians)
    scale = min(target / width, MOST_OF_SIDE * room[1] / turned_width, MOST_OF_SIDE * room[0] / turned_height)
    masks = outline(design, max(1, round(scale * TRIAL)))
    return lettering.turned(masks, degrees) if degrees else masks


def outline(design: Design, letters: int) -> Masks:
    rim = max(1, letters // 24)
    parts = []
    if design.letter:
        parts.append(lettering.badge(design.letter, 2 * letters, design.font_name, rim))
    if design.text:
        parts.append(lettering.words(design.text, lettering.face(design.font_name, letters), rim))
    return parts[0] if len(parts) == 1 else lettering.beside(parts[0], parts[1], letters // 3)


def coloured(masks: Masks, design: Design) -> Glyph:
    """A light mark with a faint dark rim, or the other way round: it can be seen on any picture."""
    fill, rim = (1.0, 0.0) if design.light else (0.0, 1.0)
    return marks.over([Layer(masks.edge, (rim,) * 3, 0.35), Layer(masks.fill, (fill,) * 3)])


def place(height: int, width: int, mark: Glyph, generator: np.random.Generator, where: str) -> marks.Place:
    right, bottom = width - mark.alpha.shape[1], height - mark.alpha.shape[0]
    if where == "centre":
        return marks.Place(right // 2, bottom // 2)
    gap = marks.margin(height, width, generator)
    return marks.Place(max(0, right - gap), max(0, bottom - gap))


def tiles(mark: Glyph, height: int, width: int, generator: np.random.Generator) -> list[Placed]:
    """Rows of marks that do not touch, every second row moved by half; those whose middle lies in the image."""
    mark_height, mark_width = mark.alpha.shape
    pitch_x, pitch_y = (
        int(mark_width * generator.uniform(1.2, 1.7)) + 1,
        int(mark_height * generator.uniform(1.2, 2)) + 1,
    )
    first_x, first_y = generator.integers(min(pitch_x, width)), generator.integers(min(pitch_y, height))
    placed = []
    for row, middle_y in enumerate(range(int(first_y), height, pitch_y)):
        start = (int(first_x) + row % 2 * pitch_x // 2) % pitch_x if row else int(first_x)
        for middle_x in range(start, width, pitch_x):
            placed.append(Placed(mark, middle_x - mark_width // 2, middle_y - mark_height // 2))
    return placed
