# SPDX-License-Identifier: Apache-2.0
"""What the comparison leaves out: tuning, decoding, serving, and which two models came from one.

python -m recipes.experts.rest --models runs/experts --out runs/experts/rest.jsonl      # or: rest tune decode
python -m recipes.experts.rest --table runs/experts/rest.jsonl
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.experts.decoding import decoding
from recipes.experts.lineage import lineage
from recipes.experts.serving import serving
from recipes.experts.tuning import UNSEEN, Rows, tuning
from recipes.rows import read, write

PARTS: dict[str, Callable[[Path], Rows]] = {"tune": tuning, "decode": decoding, "serve": serving, "lineage": lineage}


def main(models: Path, out: Path, parts: Sequence[str]) -> None:
    """A part that is there is not made again."""
    torch.set_num_threads(1)
    done = {row["part"] for row in read(out)}
    for part in parts:
        if part not in done:
            write(out, PARTS[part](models), append=True)


def table(rows: Rows) -> None:
    """Markdown: means with the lowest and the highest over models and draws, which are no independent repetitions."""
    changes = [row for row in rows if row["part"] in ("tune", "compress")]
    print("| arm | experts | maths | mean of the other five |\n| --- | --- | --- | --- |")
    for arm in dict.fromkeys(row["arm"] for row in changes):
        own = [row for row in changes if row["arm"] == arm]
        target = [row["change"][UNSEEN] for row in own]
        others = [np.mean([change for name, change in row["change"].items() if name != UNSEEN]) for row in own]
        count = f"{np.mean([row['experts'] for row in own]):.1f} of 32" if "experts" in own[0] else ""
        print(f"| {arm} | {count} | {shown(target, '+')} | {shown(others, '+')} |")
    for part, name in (("decode", "right"), ("serve", "value"), ("lineage", "distance"), ("shadows", "distance")):
        print(f"\n| {part} | {name} |\n| --- | --- |")
        own = [row for row in rows if row["part"] == part]
        for arm in dict.fromkeys(row["arm"] for row in own):
            values: dict[Any, list[float]] = {}
            for row in own:
                if row["arm"] == arm:
                    values.setdefault((row.get("model"), row["draw"]), []).append(row[name])
            strangers = [row for row in own if row["arm"] == arm and "strangers" in row]
            far = [value for row in strangers for value in row["strangers"]]
            more = f"; strangers {shown(far)}" if strangers else ""
            more += f", p {shown([row['p'] for row in strangers])}" if strangers else ""
            print(f"| {arm} | {shown([float(np.mean(own_)) for own_ in values.values()])}{more} |")
    for row in rows:
        if row["part"] == "weave":
            print(f"\nThree adapters over one base against each merged model: {row}")


def shown(values: Sequence[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} [{min(values):{sign}.3f}, {max(values):{sign}.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--models", type=Path, default=Path("runs/experts"))
    parser.add_argument("--out", type=Path, default=Path("runs/experts/rest.jsonl"))
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table is not None:
        table(read(given.table))
    else:
        main(given.models, given.out, given.parts)
