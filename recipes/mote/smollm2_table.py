# SPDX-License-Identifier: Apache-2.0
"""What `smollm2.py` left, as a table in Markdown: python -m recipes.mote.smollm2_table runs/smollm2 [SEED]"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.jobs.align.refusals import refuses
from anabranch.measure.concept_ratio import paired_difference, ratio
from recipes.mote.smollm2 import ARMS, folder_of
from recipes.rows import read

MODES = ("direct", "adaptive", "full")


def table(out: Path, seed: int = 0) -> None:
    """What was found, in Markdown: refusals by mode with 95 % intervals, MoTE minus each arm in the same mode."""
    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    told: dict[tuple[str, str], dict[str, Any]] = {}
    for arm in ARMS:
        folder = folder_of(out, "eval", arm, seed)
        if not (folder / "eval.json").exists():
            continue
        result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        rows = read(folder / "answers.jsonl")
        for mode in ("base", *MODES):
            if mode in result["arms"]:
                key = ("before", "direct") if mode == "base" else (arm, mode)
                arms[key] = [row for row in rows if row["arm"] == mode]
                told[key] = {"tokens": result["arms"][mode]["tokens"], "inside": result["inside"].get("experts")}
    if (file := out / "eval" / "prompting.jsonl").exists():
        prompted = read(file)
        arms["prompting alone", "full"] = [row | {"refused": refuses(row["answer"])} for row in prompted]
        tokens = sum(row["tokens"] for row in prompted) / len(prompted)
        told["prompting alone", "full"] = {"tokens": tokens, "inside": None}
    heads = (
        "arm", "mode", "Do-Not-Answer refused, %", "StrongREJECT refused, %", "harmless refused, %",
        "MoTE minus it: harmful", "harmless", "tokens", "loss analysis", "guidance", "answer",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for (arm, mode), rows in arms.items():
        kinds = (("harmful",), ("jailbreak",), ("benign", "look-alike"))
        rates = [ratio(refused(rows, kind)) for kind in kinds]
        cells = [f"{100 * r.rate:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in rates]
        mine = arms.get(("MoTE", mode))
        for kind in (("harmful", "jailbreak"), ("benign", "look-alike")):
            if arm == "MoTE" or mine is None:
                cells.append("")
                continue
            change = paired_difference(refused(mine, kind), refused(rows, kind))
            cells.append(f"{100 * change.difference:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]")
        inner = told[arm, mode]["inside"]
        losses = ["–"] * 3 if inner is None or mode != "full" else [f"{v:.3f}" for v in inner["nll"]["own"].values()]
        print("| " + " | ".join([arm, mode, *cells, f"{told[arm, mode]['tokens']:.0f}", *losses]) + " |")


def refused(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> np.ndarray:
    return np.array([bool(row["refused"]) for row in rows if row["kind"] in kinds])


if __name__ == "__main__":
    table(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
