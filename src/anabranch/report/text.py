# SPDX-License-Identifier: Apache-2.0
"""How the report writes numbers and names: signed points, intervals, an en dash for what is missing, inert labels."""

import math
import re
import unicodedata
from collections.abc import Callable
from numbers import Integral, Real

MISSING = "–"
MINUS = "−"

# Control characters break XML, bidirectional overrides reorder the text around them, lone surrogates cannot be encoded.
HARMFUL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

NUMBER = re.compile(r"–|([+−-]?\d[\d,]*(\.\d+)?(e[+−-]\d+)?( ?%)?)?( ?\[[^]]*\])?")


def is_missing(value: object) -> bool:
    """None, NaN and the infinities: there is no number to print."""
    return value is None or (isinstance(value, Real) and not math.isfinite(value))


def plain(value: object) -> object:
    """NumPy and torch scalars as Python numbers; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def points(value: object, digits: int = 1) -> str:
    """A signed difference: "+3.2", "−0.4", and "0.0" without a sign when it rounds to zero."""
    value = plain(value)
    if is_missing(value):
        return MISSING
    size = f"{abs(value):,.{digits}f}"
    rounds_to_zero = not any(digit in "123456789" for digit in size)
    return size if rounds_to_zero else f"{MINUS if value < 0 else '+'}{size}"


def level(value: object, digits: int = 1) -> str:
    """A value that is no difference: "62.6", "−0.4"."""
    return points(value, digits).removeprefix("+")


def interval(low: object, high: object, digits: int = 1, write: Callable[[object, int], str] = points) -> str:
    """Both ends, as points unless told otherwise: "[+1.8, +4.7]"; an en dash when neither is known."""
    low, high = plain(low), plain(high)
    if is_missing(low) and is_missing(high):
        return MISSING
    return f"[{write(low, digits)}, {write(high, digits)}]"


def estimate(
    value: object, low: object, high: object, digits: int = 1, write: Callable[[object, int], str] = points
) -> str:
    """A number with what it must carry: "+3.2 [+1.8, +4.7]"; the number alone when it has no interval."""
    shown, between = write(value, digits), interval(low, high, digits, write)
    return shown if between == MISSING else f"{shown} {between}"


def excludes(low: object, high: object, center: float = 0.0) -> bool:
    """True when a known interval leaves out the centre."""
    return not (is_missing(low) or is_missing(high)) and bool(low > center or high < center)


def cell(value: object) -> object:
    """A table cell: numbers to four significant digits, text untouched."""
    value = plain(value)
    if is_missing(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Real):
        whole = isinstance(value, Integral) or abs(value) >= 1000
        return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", MINUS)
    return value


def is_numeric(value: object) -> bool:
    """Whether a cell reads as a number, alone or with its interval, and so is set flush right."""
    return NUMBER.fullmatch(str(cell(value))) is not None


def inert(text: str) -> str:
    """Text in which nothing can act on what surrounds it; what was taken out stays visible as a replacement mark."""
    return HARMFUL.sub("\ufffd", text)


def display_width(text: str) -> int:
    """Columns the text takes: East Asian wide characters count twice, combining marks not at all."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def shorten(text: object, most: int) -> str:
    """One inert line of at most `most` columns; the middle goes first, because names often differ at the end."""
    line = " ".join(inert(str(text)).split())
    if len(line) <= 4 * most and display_width(line) <= most:
        return line
    head, tail = line[:most], line[-(most // 3) :]
    while head and display_width(head) + 1 + display_width(tail) > most:
        head = head[:-1]
    while tail and display_width(tail) + 1 > most:
        tail = tail[1:]
    return f"{head}…{tail}"
