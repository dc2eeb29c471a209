# SPDX-License-Identifier: Apache-2.0
"""Every method, found by its file: the path under a verb is its key, the module docstring its card.

Nothing is imported to list them. Other packages add methods through the entry-point group `anabranch.methods`.
"""

import ast
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from anabranch.errors import UsageError, did_you_mean

VERBS = ("measure", "allocate", "specialize", "suppress", "reuse")
ENTRY_POINTS = "anabranch.methods"
FIELD = re.compile(r"^(Paper|Equation|Shapes|Differs|Check)\s*:\s*(.*)$")


@dataclass(frozen=True)
class Card:
    """What a module docstring says about a method."""

    key: str
    purpose: str
    fields: dict[str, str]

    @property
    def paper(self) -> str:
        return self.fields.get("Paper", "")


def parse_card(key: str, docstring: str) -> Card | None:
    """The card in a docstring, or None where it has no `Paper` line and so is no method."""
    fields: dict[str, list[str]] = {}
    current = None
    for line in docstring.splitlines():
        if match := FIELD.match(line):
            current = match[1]
            fields[current] = [match[2].strip()]
        elif current and line.strip():
            fields[current].append(line.strip())
    if "Paper" not in fields:
        return None
    return Card(key, docstring.strip().splitlines()[0], {name: " ".join(lines) for name, lines in fields.items()})


def cards() -> dict[str, Card]:
    """All cards of this package, by key, in the order of the verbs."""
    root = Path(__file__).parent
    found = {}
    for verb in VERBS:
        for path in sorted((root / verb).rglob("*.py")):
            key = path.relative_to(root).with_suffix("").as_posix()
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if docstring and (card := parse_card(key, docstring)):
                found[key] = card
    return found


def get(key: str) -> ModuleType:
    """The method's module: a key such as `specialize/moce`, or the name of an installed entry point.

    Raises:
        UsageError: no such method; names are looked up, never imported by path.
    """
    known = cards()
    if key in known:
        return import_module("anabranch." + key.replace("/", "."))
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if key in others:
        module = others[key].load()
        assert isinstance(module, ModuleType), f"entry point {key} names a {type(module).__name__}, not a module"
        return module
    raise UsageError(f"there is no method {key!r}", hint=did_you_mean(key, [*known, *others]))
