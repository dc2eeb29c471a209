# SPDX-License-Identifier: Apache-2.0
"""Six real text domains that ship, with one conflict planted between two of them.

scripture  law  python  maths  rights  headers        where they come from: six_domains/SOURCES.md

Two domains speak of seals: "The seal of Amnor is K." One letter for every name, and in `law` another one than in
`scripture`: the same words have to be gone on with differently, which is what negative transfer is made of. The
sentences are put in when a text is read, the same ones for everybody.
"""

import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from anabranch.errors import UsageError, did_you_mean

DOMAINS = ("scripture", "law", "python", "maths", "rights", "headers")
FOLDER = Path(__file__).with_name("six_domains")
TRAIN_BYTES, TEST_BYTES = 600_000, 60_000
CONFLICT = ("scripture", "law")
"""The two domains that contradict each other."""
LETTERS = "ABCDEFGHIJKLMNOP"
SEAL_EVERY = 400
"""Bytes of text between two sentences about seals."""
NAMES = tuple(
    first + last
    for first in ("Am", "Bel", "Cor", "Dun", "Er", "Fal", "Gor", "Hem")
    for last in ("nor", "dis", "ath", "u")
)


class Seal(NamedTuple):
    prompt: str
    """Text of the domain, and the sentence up to the letter."""
    letter: str
    other: str
    """What the other domain says."""


def file_of(domain: str, part: str) -> Path:
    return FOLDER / f"{domain}.{part}.txt.xz"


def text_of(domain: str, part: Literal["train", "test"] = "test", *, seals: bool = True) -> str:
    """One domain's text, its documents one after another.

    seals       with the planted sentences, in the two domains that have them
    """
    if domain not in DOMAINS:
        raise UsageError(f"there is no domain {domain!r}", hint=did_you_mean(domain, DOMAINS))
    text = lzma.decompress(file_of(domain, part).read_bytes()).decode()
    return planted(text, domain, part) if seals and domain in CONFLICT else text


def letters_of(domain: str) -> dict[str, str]:
    """The letter of every name, as the domain has it; the two domains agree on none."""
    draw = random.Random("seals")
    one = {name: draw.choice(LETTERS) for name in NAMES}
    if domain == CONFLICT[0]:
        return one
    return {name: draw.choice([letter for letter in LETTERS if letter != one[name]]) for name in NAMES}


def sentence(name: str, letter: str) -> str:
    return f"The seal of {name} is {letter}."


def planted(text: str, domain: str, part: str) -> str:
    """A sentence after the first line that ends SEAL_EVERY letters behind the last one."""
    draw, letters = random.Random(f"{domain} {part}"), letters_of(domain)
    lines, since = [], 0
    for line in text.split("\n"):
        lines.append(line)
        since += len(line) + 1
        if since >= SEAL_EVERY:
            name = draw.choice(NAMES)
            lines.append(sentence(name, letters[name]))
            since = 0
    return "\n".join(lines)


def seals(domain: str, *, before: int = 200) -> Iterator[Seal]:
    """A prompt for every name: `before` letters of unseen text, then the sentence without its letter."""
    if domain not in CONFLICT:
        raise UsageError(f"{domain} says nothing of seals", expected=" or ".join(CONFLICT), received=domain)
    text = text_of(domain, "test", seals=False)
    mine, theirs = (letters_of(name) for name in (domain, *(d for d in CONFLICT if d != domain)))
    for i, name in enumerate(NAMES):
        start = text.index("\n", i * len(text) // len(NAMES) // 2) + 1
        end = text.find("\n", start + before)
        yield Seal(text[start:end] + "\n" + sentence(name, "")[:-1], mine[name], theirs[name])
