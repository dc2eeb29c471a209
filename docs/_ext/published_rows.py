# SPDX-License-Identifier: Apache-2.0
"""Rows of published tables that bear a method's name, and those of the controls beside them.

Nothing is guessed: TABLES says which table speaks of which methods, and a row counts only where its first cell is the
method's name, alone or before a blank or a sign (`naee`, `naee (24 % of the slots)`, `mc_smoe: random groups`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RANKINGS, PRUNING = "measure/experts/ranking/", "reuse/prune/"


@dataclass(frozen=True)
class Speaks:
    """A table of a file, known by the first words of the heading above it, and the methods that its rows are of."""

    file: str
    heading: str
    methods: dict[str, str] | tuple[str, ...]
    """Beginnings of keys, the rest of which is the row's name; or key to row's name."""
    controls: tuple[str, ...]


EXPERTS = "recipes/experts/README.md"
RANDOM = ("random",)
TABLES = (
    Speaks(EXPERTS, "Rankings", (RANKINGS,), RANDOM),
    Speaks(EXPERTS, "Pruning", (PRUNING, RANKINGS), RANDOM),
    Speaks(EXPERTS, "Merging", ("reuse/merge/",), ()),
    Speaks(EXPERTS, "Steering", ("reuse/steer/",), ()),
    Speaks(EXPERTS, "Skipping", ("reuse/skip/",), ("half of the second slots",)),
    Speaks(
        EXPERTS, "Tuning, decoding", {"specialize/esft": "esft_token, p .5", "specialize/ceft": "ceft"},
        ("2 random ones a layer", "2 least used ones", "all experts"),
    ),
    Speaks("docs/comparison.md", "MoCE", {"specialize/moce": "moce"}, ("continued", "random-clusters", "oracle")),
    Speaks(
        "docs/comparison.md", "SDR", {"specialize/sdr/supernet": "sdr"}, ("continued", "by-cluster", "sdr-random")
    ),
    Speaks(
        "recipes/mote/README.md", "2,000 steps", {"specialize/mote/mote": "MoTE"}, ("LoRA", "random ids", "token ids")
    ),
    Speaks(
        "recipes/geom_erasing/README.md", "Table",
        {
            "suppress/geom_erasing/erase": "boxes",
            "suppress/baselines/uce": "UCE",
            "suppress/baselines/sld": "SLD",
            "suppress/baselines/esd": "ESD-x",
            "suppress/baselines/concept_ablation": "Concept Ablation",
            "suppress/baselines/data_filtering": "filtering",
            "suppress/baselines/masked_loss": "masked loss",
            "suppress/baselines/clean_oracle": "oracle",
            "suppress/baselines/fine_tuning": "plain",
            "suppress/geom_erasing/bake": "baked",
        },
        ("base", "plain", "oracle"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    title: str
    page: str
    """Of the documentation, without suffix."""
    lines: list[str]


def rows_of(key: str, root: Path) -> list[Rows]:
    """Every table that has a row of this method."""
    return [rows for one in TABLES if (name := name_in(one, key)) and (rows := cut(one, name, root))]


def name_in(speaks: Speaks, key: str) -> str | None:
    if isinstance(speaks.methods, dict):
        return speaks.methods.get(key)
    return next((key.removeprefix(start) for start in speaks.methods if key.startswith(start)), None)


def cut(speaks: Speaks, name: str, root: Path) -> Rows | None:
    path = root / speaks.file
    if not path.is_file():
        return None
    title, table = under(path.read_text(encoding="utf-8"), speaks.heading)
    head, ruler, *rows = table or [(), ()]
    own = [row for row in rows if bears(row[0], name)]
    if not own:
        return None
    beside = [row for row in rows if row not in own and any(bears(row[0], control) for control in speaks.controls)]
    return Rows(title, page_of(speaks.file), [line_of(row) for row in (head, ruler, *own, *beside)])


def bears(cell: str, name: str) -> bool:
    return re.match(rf"{re.escape(name)}(?=$|[ ,:(])", cell) is not None


def under(text: str, heading: str) -> tuple[str, list[tuple[str, ...]]]:
    """The heading that starts so, in full, and the first table under it."""
    lines = iter(text.splitlines())
    for line in lines:
        if match := re.match(rf"#+ ({re.escape(heading)}.*)$", line):
            return match[1], list(table_after(lines))
    return heading, []


def table_after(lines: Iterator[str]) -> Iterator[tuple[str, ...]]:
    begun = False
    for line in lines:
        if line.startswith("|"):
            begun = True
            yield tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        elif begun or line.startswith("#"):
            return


def line_of(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(row) + " |"


def page_of(file: str) -> str:
    if file.startswith("docs/"):
        return file.removeprefix("docs/").removesuffix(".md")
    return f"results/{file.split('/')[1]}"
