# SPDX-License-Identifier: Apache-2.0
"""What the comparison leaves out: tuning, decoding, serving, and which two models came from one.

python -m recipes.experts.rest --models runs/experts --out runs/experts/rest.jsonl      # or: rest tune decode
python -m recipes.experts.rest --table runs/experts/rest.jsonl
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.measure.intervals import interval
from recipes.experts.decoding import decoding
from recipes.experts.lineage import lineage
from recipes.experts.serving import serving
from recipes.experts.tuning import UNSEEN, Rows, tuning
from recipes.mote.policy import read

PARTS: dict[str, Callable[[Path], Rows]] = {"tune": tuning, "decode": decoding, "serve": serving, "lineage": lineage}


def main(models: Path, out: Path, parts: Sequence[str]) -> None:
    """A part that is there is not made again."""
    torch.set_num_threads(1)
    done = {row["part"] for row in read(out)}
    for part in parts:
        if part not in done:
            rows = [*read(out), *PARTS[part](models)]
            out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(rows: Rows) -> None:
    changes = [row for row in rows if row["part"] in ("tune", "compress")]
    print("| arm | experts | maths | mean of the other five |\n| --- | --- | --- | --- |")
    for arm in dict.fromkeys(row["arm"] for row in changes):
        own = [row for row in changes if row["arm"] == arm]
        target = interval([row["change"][UNSEEN] for row in own])
        others = interval([np.mean([v for name, v in row["change"].items() if name != UNSEEN]) for row in own])
        count = f"{np.mean([row['experts'] for row in own]):.1f} of 32" if "experts" in own[0] else ""
        print(f"| {arm} | {count} | {shown(target)} | {shown(others)} |")
    for part, name in (("decode", "right"), ("serve", "value"), ("lineage", "distance")):
        print(f"\n| {part} | {name} |\n| --- | --- |")
        own = [row for row in rows if row["part"] == part]
        for arm in dict.fromkeys(row["arm"] for row in own):
            values: dict[Any, list[float]] = {}
            for row in own:
                if row["arm"] == arm:
                    values.setdefault((row.get("model"), row["draw"]), []).append(row[name])
            more = "".join(
                f"; strangers {np.mean(row['strangers']):.3f}, p {row['p']:.2f}"
                for row in own if row["arm"] == arm and "p" in row and row["draw"] == 0
            )  # fmt: skip
            print(f"| {arm} | {shown(interval([float(np.mean(v)) for v in values.values()]))}{more} |")
    for row in rows:
        if row["part"] == "weave":
            print(f"\nExpertWeave: {row}")


def shown(found: Any) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


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
