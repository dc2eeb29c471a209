# SPDX-License-Identifier: Apache-2.0
"""One page a method, written from its card before the pages are read; no method is imported.

A page has what the card says, the row of a published table where one bears the method's name, its source and its test.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_rows import rows_of
from written import Folder

from anabranch import registry

FOLDER = "methods"
OTHERS = "others"
TITLES = {
    "measure": "Measure: is there negative transfer, which expert knows what, is it gone?",
    "allocate": "Allocate: who learns what",
    "specialize": "Specialize: how experts become different",
    "suppress": "Suppress: what must not transfer",
    "reuse": "Reuse: what is taken along",
    OTHERS: "Methods of other installed packages",
}
FIELDS = ("Paper", "Equation", "Shapes", "Differs", "Check", "Exempt")
SAYS = {
    "Shapes": "Shapes",
    "Differs": "What differs from the paper",
    "Check": "How it is checked",
    "Exempt": "Exempt from the contract",
}
ARXIV = re.compile(r"\b(?:arXiv[ :]?)?(\d{4}\.\d{5})\b")
OLD_ARXIV = re.compile(r"\barXiv[ :](\d{4}\.\d{4})\b")
DOI = re.compile(r"\b(10\.\d{4,}/[^\s,;)]*[^\s,;.)])")
TEST = re.compile(r"tests/[\w/]+\.py")


@dataclass(frozen=True)
class Method:
    """A card with the lines that it was written in, and the file that it stands in."""

    key: str
    purpose: str
    fields: Mapping[str, str]
    """Lines as they were broken."""
    notes: str
    """What follows the card in the docstring."""
    source: Path | None
    package: str = "anabranch"

    @property
    def page(self) -> str:
        return self.key if self.verb != OTHERS else f"{OTHERS}/{re.sub(r'[^a-z0-9_]+', '-', self.key.lower())}"

    @property
    def verb(self) -> str:
        return self.key.split("/")[0] if self.package == "anabranch" else OTHERS

    @property
    def short(self) -> str:
        """The key within its verb."""
        return self.key.removeprefix(f"{self.verb}/")


def read(card: registry.Card) -> Method:
    """The card once more, as it was written."""
    fields, notes = lines_of(registry.docstring_of(card.path)) if card.path else ({}, "")
    return Method(card.key, card.purpose, fields, notes, card.path, card.package)


def lines_of(docstring: str) -> tuple[dict[str, str], str]:
    """The fields with their line breaks, and the text after the card."""
    fields: dict[str, list[str]] = {}
    notes: list[str] = []
    current: list[str] | None = None
    begin = re.compile(rf"^({'|'.join(FIELDS)})\s*:\s?(.*)$")
    for line in docstring.splitlines()[1:]:
        if match := begin.match(line):
            current = fields.setdefault(match[1], [])
            current.append(match[2].strip())
        elif line.startswith(" ") and line.strip() and current is not None:
            current.append(line.strip())
        else:
            current = None
            if fields:
                notes.append(line)
    return {name: "\n".join(lines) for name, lines in fields.items()}, "\n".join(notes).strip()


def methods() -> list[Method]:
    """Every method of this package by its file, then those that installed packages announce."""
    return [read(card) for card in [*registry.cards().values(), *registry.installed_cards().values()]]


# Pages ----------------------------------------------------------------------------------------------------------------


def page_of(method: Method, root: Path) -> str:
    """The page of one method; `root` is the repository, for its test and the published tables."""
    lines = [f"# {method.key}", "", linked(method.purpose), ""]
    if "Paper" in method.fields:
        lines += ["## Paper", "", linked(oneline(method.fields["Paper"])), ""]
    if "Equation" in method.fields:
        lines += ["## Equation", "", *fenced(method.fields["Equation"], "{code-block} text\n:class: equation\n"), ""]
    tests = [root / name for name in TEST.findall(method.fields.get("Check", "")) if (root / name).is_file()]
    for name, title in SAYS.items():
        if name in method.fields:
            lines += [f"## {title}", "", led_to(tests, linked(oneline(method.fields[name])), method, root), ""]
    if method.notes:
        lines += ["## Notes", "", linked(method.notes), ""]
    lines += measured(method, root)
    lines += ["## Source", "", *source_of(method, root), ""]
    lines += ["## Test", ""] if tests else []
    for test in tests:
        name = test.relative_to(root).as_posix()
        lines += [f"({anchor(method, name)})=", f"`{name}`", "", *folded(test), ""]
    return "\n".join(lines)


def oneline(text: str) -> str:
    return " ".join(text.split())


def linked(text: str) -> str:
    """Plain text as Markdown: nothing in it is markup but code in backticks; papers become links."""
    parts = re.split(r"(`[^`]*`)", text)
    out = "".join(part if part.startswith("`") else escaped(part) for part in parts)
    out = ARXIV.sub(lambda m: f"[{m[0]}](https://arxiv.org/abs/{m[1]})", out)
    out = OLD_ARXIV.sub(lambda m: f"[{m[0]}](https://arxiv.org/abs/{m[1]})", out)
    return DOI.sub(lambda m: f"[{m[0]}](https://doi.org/{m[1]})", out)


def led_to(tests: Iterable[Path], text: str, method: Method, root: Path) -> str:
    """The names of tests lead down to them."""
    for test in tests:
        name = test.relative_to(root).as_posix()
        text = text.replace(escaped(name), f"[{escaped(name)}](#{anchor(method, name)})")
    return text


def escaped(text: str) -> str:
    return re.sub(r"([\\*_\[\]<>|#$~^{}])", r"\\\1", text)


def anchor(method: Method, test: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{method.key} {test}".lower())


def fenced(text: str, language: str) -> list[str]:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{ticks}{language}", *text.rstrip().splitlines(), ticks]


def folded(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    return [f"<details><summary>{count} lines</summary>", "", *fenced(text, "python"), "", "</details>"]


def source_of(method: Method, root: Path) -> list[str]:
    if method.package == "anabranch":
        where = f"`src/anabranch/{method.key}.py`"
    else:
        where = f"In the package `{method.package}`"
    said = f'{where}; its module in Python is `anabranch.registry.get("{method.key}")`.'
    return [said, "", *(folded(method.source) if method.source else [])]


def measured(method: Method, root: Path) -> list[str]:
    found = rows_of(method.key, root) if method.package == "anabranch" else []
    lines = []
    for table in found:
        lines += [f"**{escaped(table.title)}** ([the whole table](/{table.page}.md))", "", *table.lines, ""]
    if not lines:
        return []
    return ["## Measured", "", "Rows of this method and of its controls, as published; intervals are 95 %.", "", *lines]


def index_of(verb: str, found: list[Method]) -> str:
    return "\n".join([f"# {TITLES[verb]}", "", *table(found), "", *toctree({m.short: m.page for m in found}), ""])


def table(found: Iterable[Method]) -> list[str]:
    rows = ["| method | what it does | papers |", "| --- | --- | --- |"]
    for m in found:
        name = f"[{escaped(m.short)}](/{FOLDER}/{m.page}.md)"
        rows.append(f"| {name} | {linked(m.purpose)} | {', '.join(papers(m.fields.get('Paper', '')))} |")
    return rows


def papers(text: str) -> list[str]:
    """Links alone, in the order of the card, each once."""
    numbers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))
    return [f"[{number}](https://arxiv.org/abs/{number})" for number in numbers]


def toctree(pages: Mapping[str, str]) -> list[str]:
    return ["```{toctree}", ":hidden:", "", *(f"{name} </{FOLDER}/{page}>" for name, page in pages.items()), "```"]


def by_verb(found: Iterable[Method]) -> dict[str, list[Method]]:
    groups: dict[str, list[Method]] = {verb: [] for verb in registry.VERBS}
    for method in found:
        groups.setdefault(method.verb, []).append(method)
    return {verb: group for verb, group in groups.items() if group}


def overview(groups: Mapping[str, list[Method]]) -> str:
    count = sum(map(len, groups.values()))
    lines = [
        "# All methods", "",
        f"{count} methods. Each page is made from the card at the head of the method's file, the same that `anabranch "
        "list NAME` prints; its key is the path of that file. How one is added: [your own method](../add-a-method.md).",
    ]  # fmt: skip
    for verb, group in groups.items():
        lines += ["", f"## {TITLES[verb]}", "", *table(group)]
    return "\n".join([*lines, "", *toctree({verb.capitalize(): f"{verb}-index" for verb in groups}), ""])


def write(docs: Path, root: Path) -> list[Method]:
    """All pages under docs/methods; what no method stands behind any more is taken away."""
    found = methods()
    groups = by_verb(found)
    with Folder(docs / FOLDER) as folder:
        folder.write("index.md", overview(groups))
        for verb, group in groups.items():
            folder.write(f"{verb}-index.md", index_of(verb, group))
        for method in found:
            folder.write(f"{method.page}.md", page_of(method, root))
    return found


def builder_inited(app: Any) -> None:
    docs = Path(app.srcdir)
    write(docs, docs.parent)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", builder_inited)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
