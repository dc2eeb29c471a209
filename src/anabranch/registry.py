# SPDX-License-Identifier: Apache-2.0
"""Every method, found by its file: the path under a verb is its key, the module docstring its card.

Nothing is imported to list them. Other packages add methods through the entry-point group `anabranch.methods`.
"""

import ast
import re
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from anabranch.errors import UsageError, did_you_mean
from anabranch.plugins import METHODS, broken, load, plugins

VERBS = ("measure", "allocate", "specialize", "suppress", "reuse")
DOCSTRING = re.compile(r'(?:[ \t]*(?:#[^\n]*)?\n)*[rR]?"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""[ \t]*\n', re.DOTALL)
FIELD = re.compile(r"^(Paper|Equation|Shapes|Differs|Check|Exempt)\s*:\s*(.*)$")
EXEMPTION = re.compile(r"\s*([a-z, ]+?)\s*\((.+)\)\s*")


@dataclass(frozen=True)
class Card:
    """What a module docstring says about a method."""

    key: str
    purpose: str
    fields: dict[str, str]
    package: str = "anabranch"
    """Who brought it."""
    path: Path | None = None
    """The file that it stands in."""

    @property
    def paper(self) -> str:
        return self.fields.get("Paper", "")

    @property
    def exempt(self) -> dict[str, str]:
        """Checks of the contract that the method is not held to, each with the reason."""
        found = {}
        for part in filter(None, self.fields.get("Exempt", "").split(";")):
            match = EXEMPTION.fullmatch(part)
            if match is None:
                raise UsageError(f"{self.key}: an exemption without a reason", expected="name (reason)", received=part)
            found |= {name.strip(): match[2] for name in match[1].split(",")}
        return found


def parse_card(key: str, docstring: str) -> Card | None:
    """The card in a docstring, or None where it has no `Paper` line and so is no method."""
    fields: dict[str, list[str]] = {}
    current = None
    for line in docstring.splitlines():
        if match := FIELD.match(line):
            current = match[1]
            fields[current] = [match[2].strip()]
        elif not line.strip():
            current = None  # what follows the card is no part of its last field
        elif current:
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
            if card := parse_card(key, docstring_of(path)):
                found[key] = replace(card, path=path)
    return found


def installed_cards() -> dict[str, Card]:
    """Cards of the methods that other packages announce, by name; read from their files, nothing of them is run."""
    found = {}
    for name, (point, *others) in plugins(METHODS).items():
        path = module_file(point.module)
        card = parse_card(name, docstring_of(path)) if path else None
        card = card or Card(name, f"no card is to be found in {point.module}", {})
        packages = [other.dist.name if other.dist else "?" for other in (point, *others)]
        found[name] = replace(card, package=" and ".join(packages), path=path)
    return found


def docstring_of(path: Path) -> str:
    """The module docstring; where the file begins with it, nothing after it is parsed."""
    text = path.read_text(encoding="utf-8")
    head = DOCSTRING.match(text)
    return ast.get_docstring(ast.parse(head[0] if head else text)) or ""


def module_file(module: str) -> Path | None:
    """Where a module stands; its parent packages are not run either, as `find_spec` of a dotted name would."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    if spec is None or not parts:
        return Path(spec.origin) if spec and spec.origin else None
    places = [Path(place, *parts) for place in spec.submodule_search_locations or ()]
    files = [file for place in places for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def get(key: str) -> ModuleType:
    """The method's module: a key such as `specialize/moce`, or the name of an installed entry point.

    Raises:
        UsageError: no such method; names are looked up, never imported by path.
    """
    known = cards()
    if key in known:
        return import_module("anabranch." + key.replace("/", "."))
    others = plugins(METHODS)
    if key in others:
        module, package = load(METHODS, key)
        if not isinstance(module, ModuleType):
            raise broken(key, package, f"a {type(module).__name__}", "a module")
        return module
    raise UsageError(f"there is no method {key!r}", hint=did_you_mean(key, [*known, *others]))
