# SPDX-License-Identifier: Apache-2.0
"""Draw docs/architecture.md and its picture from the imports, so that they can't say anything else.

    python scripts/architecture.py            # writes both
    python scripts/architecture.py --check    # exit code 3 if they are out of date

A room is a folder of the package. It stands one floor below the lowest room that imports it; the order within a floor
is that of ROOMS.
"""

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE, PICTURE = (
    ROOT / "src" / "anabranch",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "architecture.svg",
)
ROOMS = {
    "cli": "one file a command; torch is imported once it runs",
    "jobs": "the commands' work: verbs put together into a run with a folder and a page",
    "report": "tables, figures, one offline page a run",
    "suppress": "what must not transfer: erasers, detectors, attacks",
    "specialize": "how experts become different",
    "allocate": "who learns what: from data to groups",
    "reuse": "what is taken along: customise, prune, merge, steer, skip, serve",
    "testing": "contracts that methods pass, yours too",
    "data": "images, texts, shipped corpora, generated worlds whose truth is known",
    "train": "one training loop: steps, checkpoints, resuming, signals, several processes",
    "measure": "is there negative transfer? which expert knows what? is it really gone?",
    "mixture": "the layer that branches and rejoins: contexts, routers, banks of experts, dispatch; torch alone",
    "models": "bridges to other people's models: transformers, diffusers, peft",
}
WIDTH, BOX, FLOOR, MARGIN = 920, (118, 44), 104, 26
STYLE = """
svg { font: 15px system-ui, sans-serif; }
rect { fill: #f4f7f6; stroke: #2f6f62; stroke-width: 1.2; }
text { fill: #16302b; text-anchor: middle; }
path { fill: none; stroke: #5d8f85; stroke-width: 1.1; opacity: .65; }
@media (prefers-color-scheme: dark) {
  rect { fill: #16302b; stroke: #7fc4b5; } text { fill: #e6f2ef; } path { stroke: #7fc4b5; }
}
"""


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("anabranch"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("anabranch.")} & set(ROOMS)


def arrows() -> dict[str, set[str]]:
    """Room to the rooms that it imports."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS), f"rooms without a word about them, or words without a room: {rooms ^ set(ROOMS)}"
    return {room: set().union(*(imported(path) for path in (PACKAGE / room).rglob("*.py"))) - {room} for room in ROOMS}


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """0 for a room that nobody imports, else one below the lowest that imports it."""
    known: dict[str, int] = {}
    while len(known) < len(edges):
        above = {room: {other for other in edges if room in edges[other]} for room in edges if room not in known}
        ready = [room for room, others in above.items() if others <= known.keys()]
        assert ready, f"rooms import each other in a circle: {sorted(above)}"
        known |= {room: 1 + max((known[other] for other in above[room]), default=-1) for room in ready}
    return known


def direct(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows without those that a longer way says already: only these are drawn."""
    reached: dict[str, set[str]] = {}
    for room in sorted(edges, key=floors(edges).__getitem__, reverse=True):
        reached[room] = edges[room].union(*(reached[other] for other in edges[room]))
    return {room: {o for o in others if not any(o in reached[x] for x in others)} for room, others in edges.items()}


def picture(edges: dict[str, set[str]]) -> str:
    level, (wide, high) = floors(edges), BOX
    depth = max(level.values())
    places = {}
    for floor in range(depth + 1):
        row = [room for room in ROOMS if level[room] == floor]
        for i, room in enumerate(row):
            places[room] = (WIDTH * (i + 0.5) / len(row), MARGIN + floor * FLOOR + high / 2)
    lines = []
    for room, others in direct(edges).items():
        for other in sorted(others):
            (x, y), (u, v) = places[room], places[other]
            y, v = y + high / 2, v - high / 2
            bend = (v - y) / 2
            lines.append(f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}"/>')
    for room, (x, y) in places.items():
        box = f'<rect x="{x - wide / 2:.0f}" y="{y - high / 2:.0f}" width="{wide}" height="{high}" rx="8"/>'
        told = f'<text x="{x:.0f}" y="{y + 5:.0f}">{room}</text>'
        lines.append(f"<g><title>{escape(ROOMS[room])}</title>{box}{told}</g>")
    height = depth * FLOOR + high + 2 * MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join(
        [head, "<title>Which rooms of the package import which</title>", f"<style>{STYLE}</style>", *lines, "</svg>\n"]
    )


def page(edges: dict[str, set[str]]) -> str:
    level = floors(edges)
    rows = [
        f"| `{room}` | {ROOMS[room]} | {', '.join(f'`{o}`' for o in ROOMS if o in edges[room]) or 'none'} |"
        for room in sorted(ROOMS, key=lambda room: (level[room], list(ROOMS).index(room)))
    ]
    return "\n".join([
        "# Architecture",
        "",
        "The package is a house of rooms. A line goes down from a room to one that it imports; what follows from",
        "longer ways is left out. Made from the imports by `python scripts/architecture.py`; a test keeps it true.",
        "",
        "![Which rooms import which](architecture.svg)",
        "",
        "| room | what is in it | imports |",
        "| --- | --- | --- |",
        *rows,
        "",
        "The verbs (`measure`, `allocate`, `specialize`, `suppress`, `reuse`) never import each other, but for",
        "`measure`, which anyone may use; `jobs` puts them together. A method is one file under its verb: the path is",
        "its key and the docstring its card, so that adding one edits nothing else. Beside the package stand",
        "`recipes/` (one folder a published result), `benchmarks/` (ratios against named peers) and `tests/` (the",
        "paths of `src/anabranch` again).",
        "",
    ])  # fmt: skip


def main() -> int:
    edges = arrows()
    made = {PAGE: page(edges), PICTURE: picture(edges)}
    if "--check" in sys.argv[1:]:
        stale = [
            path.name for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        print(f"out of date: {', '.join(stale)}" if stale else "as the imports say")
        return 3 if stale else 0
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
