# SPDX-License-Identifier: Apache-2.0
"""Mark `text`: a few words over the picture, as on posters and in subtitles.

Words     : 1-6 everyday ones on 1-2 lines; those that would not fit the width are left out.
Look      : half of them outlined, half on a plate.
Size      : letters U(0.06, 0.15) of the short side, at least 8 pixels.
Place     : 70 % in the middle of the top or bottom band, else anywhere.
Opacity   : 1.
"""

import numpy as np

from anabranch.data import marks
from anabranch.data.icd import lettering
from anabranch.data.icd.lettering import FACES, WORDS, Masks
from anabranch.data.icd.look import Look, Range, refuse_patch_settings
from anabranch.data.marks import Glyph, Layer, Placed

SIZE = (0.06, 0.15)
LEAST_LETTERS, LEAST_SIDE = 8, 64
MOST_WIDTH, MOST_HEIGHT, BAND_SHARE = 0.92, 0.8, 0.7
BLACK, WHITE, YELLOW, RED, BLUE = (
    (0.05, 0.05, 0.05),
    (1.0, 1.0, 1.0),
    (1.0, 0.87, 0.2),
    (0.8, 0.1, 0.12),
    (0.1, 0.2, 0.5),
)
OUTLINED = ((WHITE, BLACK), (WHITE, BLACK), (YELLOW, BLACK), (BLACK, WHITE), (RED, WHITE))
PLATED = ((WHITE, BLACK), (BLACK, WHITE), (WHITE, RED), (WHITE, BLUE), (BLACK, YELLOW))
"""Colours of the letters and of what is around them."""


def check(look: Look) -> None:
    refuse_patch_settings(look, "text")


def opacity(look: Look) -> Range:
    return look.opacity or (1.0, 1.0)


def least_side(look: Look) -> int:
    return LEAST_SIDE


def draw(height: int, width: int, look: Look, generator: np.random.Generator) -> list[Placed]:
    chosen = [str(word) for word in generator.choice(WORDS, generator.integers(1, 7), replace=False)]
    manner = str(generator.choice(("lower", "title", "upper")))
    num_lines, plated = int(generator.integers(1, 3)), bool(generator.random() < 0.5)
    colours = (PLATED if plated else OUTLINED)[generator.integers(5)]
    font_name = str(generator.choice(FACES[:5]))
    letters = generator.uniform(*(look.size or SIZE)) * min(height, width)

    sentence = getattr(" ".join(chosen), manner)().split(" ")
    made = fitted(sentence, num_lines, font_name, max(LEAST_LETTERS, round(letters)), plated, (height, width))
    mark = coloured(made, colours)
    x, y = place(height, width, mark, generator)
    return [Placed(mark, x, y)]


def fitted(
    sentence: list[str], num_lines: int, font_name: str, letters: int, plated: bool, room: tuple[int, int]
) -> Masks:
    """The masks of as many words as fit; the letters get smaller only where not even one does."""
    while True:
        made = set_lines(sentence, num_lines, font_name, letters, plated)
        height, width = made.edge.shape
        if width <= MOST_WIDTH * room[1] and height <= MOST_HEIGHT * room[0]:
            return made
        if len(sentence) > 1:
            sentence = sentence[:-1]
        else:
            letters = min(letters - 1, int(letters * MOST_WIDTH * room[1] / width))


def set_lines(sentence: list[str], num_lines: int, font_name: str, letters: int, plated: bool) -> Masks:
    half = (len(sentence) + 1) // 2
    lines = [sentence[:half], sentence[half:]] if num_lines == 2 and len(sentence) > 1 else [sentence]
    font = lettering.face(font_name, letters)
    masks = lettering.words("\n".join(" ".join(line) for line in lines), font, 0 if plated else max(1, letters // 12))
    if not plated:
        return masks
    fill = np.pad(masks.fill, ((letters // 4,) * 2, (letters // 3,) * 2))
    return Masks(fill, np.ones_like(fill))


def coloured(masks: Masks, colours: tuple[tuple[float, float, float], ...]) -> Glyph:
    return marks.over([Layer(masks.edge, colours[1]), Layer(masks.fill, colours[0])])


def place(height: int, width: int, mark: Glyph, generator: np.random.Generator) -> marks.Place:
    right, bottom = width - mark.alpha.shape[1], height - mark.alpha.shape[0]
    if generator.random() >= BAND_SHARE:
        return marks.Place(int(generator.integers(right + 1)), int(generator.integers(bottom + 1)))
    gap = min(marks.margin(height, width, generator), bottom)
    return marks.Place(right // 2, gap if generator.random() < 0.5 else bottom - gap)
