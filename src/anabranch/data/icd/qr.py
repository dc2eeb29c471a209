# SPDX-License-Identifier: Apache-2.0
"""Mark `qr`: a QR code of a made-up address, black on a white plate.

Code      : error level M; the addresses end in .test, which nobody owns; quiet zone of 2-4 modules.
Size      : side U(0.15, 0.35) of the short side, rounded to a whole number of pixels a module, so that it scans.
Place     : 70 % in a corner, else anywhere.
Opacity   : 1.
"""

import math
from importlib.util import find_spec

import numpy as np

from anabranch.data import marks
from anabranch.data.icd.look import Look, Range, refuse_patch_settings
from anabranch.data.marks import Glyph, Placed
from anabranch.errors import UsageError

SIZE = (0.15, 0.35)
QUIET_ZONE = (2, 4)
MOST_MODULES = 25 + 2 * QUIET_ZONE[1]
"""On a side, with the quiet zone: version 2 holds every address that is made here."""
ALPHABET = np.array(list("abcdefghjkmnpqrstuvwxyz23456789"))


def check(look: Look) -> None:
    refuse_patch_settings(look, "qr")
    if find_spec("segno") is None:
        raise UsageError("QR codes need the package segno", hint="pip install 'anabranch[erase]'")


def opacity(look: Look) -> Range:
    return look.opacity or (1.0, 1.0)


def least_side(look: Look) -> int:
    return math.ceil(MOST_MODULES / (look.size or SIZE)[1])


def draw(height: int, width: int, look: Look, generator: np.random.Generator) -> list[Placed]:
    low, high = look.size or SIZE
    modules_MM = np.pad(code(address(generator)), int(generator.integers(QUIET_ZONE[0], QUIET_ZONE[1] + 1)))
    scale = pixels_a_module(len(modules_MM), min(height, width), low, high, generator)
    value_SS = 1 - np.kron(modules_MM, np.ones((scale, scale), np.float32))
    x, y = marks.place(height, width, len(value_SS), generator)
    return [Placed(Glyph(np.ones_like(value_SS), value_SS), x, y)]


def pixels_a_module(num_modules: int, short: int, low: float, high: float, generator: np.random.Generator) -> int:
    """U(low, high) of the short side, rounded to whole pixels a module within the range where there are any."""
    most = int(high * short / num_modules)
    least = min(math.ceil(low * short / num_modules), most)
    return int(np.clip(round(generator.uniform(low, high) * short / num_modules), max(least, 1), max(most, 1)))


def address(generator: np.random.Generator) -> str:
    """22 to 26 characters."""
    host, path = ("".join(generator.choice(ALPHABET, generator.integers(4, 7))) for _ in range(2))
    return f"https://{host}.test/{path}"


def code(payload: str) -> np.ndarray:
    """(M, M) float32, 1 where a module is dark, without quiet zone."""
    import segno

    made = segno.make(payload, error="m", micro=False, boost_error=False)
    return np.array([list(row) for row in made.matrix], dtype=np.float32)
