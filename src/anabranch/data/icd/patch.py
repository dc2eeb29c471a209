# SPDX-License-Identifier: Apache-2.0
"""Mark `patch`: one small glyph, the same on every image, for images too small for the other kinds.

Size      : 7 pixels, 8 with a plate; fixed.
Place     : as `marks.place` says: corners (70 %), any, or grid.
Opacity   : 1; with a plate U(0.85, 1).
"""

import numpy as np

from anabranch.data import marks
from anabranch.data.icd.look import Look, Range
from anabranch.data.marks import PLACES, Placed
from anabranch.errors import UsageError, did_you_mean


def check(look: Look) -> None:
    if look.size is not None:
        raise UsageError("size would change nothing: a patch is as many pixels on every image", hint="set glyph_size")
    if look.places not in PLACES:
        raise UsageError(
            f"there are no places {look.places!r}", expected=", ".join(PLACES), hint=did_you_mean(look.places, PLACES)
        )
    if look.grid_step < 1:
        raise UsageError("grid_step is too small", expected="at least 1 pixel", received=look.grid_step)
    marks.glyph(look.glyph, least_side(look))


def opacity(look: Look) -> Range:
    return look.opacity or ((0.85, 1.0) if look.glyph.startswith("plate") else (1.0, 1.0))


def least_side(look: Look) -> int:
    if look.glyph_size is not None:
        return look.glyph_size
    return 8 if look.glyph.startswith("plate") else 7


def draw(height: int, width: int, look: Look, generator: np.random.Generator) -> list[Placed]:
    size = least_side(look)
    x, y = marks.place(height, width, size, generator, look.places, look.grid_step)
    return [Placed(marks.glyph(look.glyph, size), x, y)]
