# SPDX-License-Identifier: Apache-2.0
"""What `policy.py` left, as tables in Markdown, and the curve over steps as a picture.

python -m recipes.mote.table runs/mote --steps 700 > recipes/mote/policy-700.md
python -m recipes.mote.table runs/mote --curve recipes/mote/curve.svg
"""

import argparse
from pathlib import Path
from typing import Any

from anabranch.jobs.align.policy_arms import ARMS
from anabranch.measure.intervals import interval
from anabranch.report.figures import curves
from anabranch.report.page import standalone
from recipes.rows import read

METHOD = "MoTE"
SHARES = {
    "exact": "exact",
    "whole_chain": "whole chain",
    "harmless": "harmless",
    "right_alternative": "refused, right words",
    "helpful": "helpful",
    "malformed": "malformed",
}
CURVE = ("MoTE", "LoRA, equal total", "LoRA, equal active", "no shared, equal total", "token ids", "random ids")
Rows = dict[str, dict[int, Any]]


def main(folder: Path, steps: int, curve: Path | None) -> None:
    if curve is not None:
        draw(folder, curve)
        return
    rows = rows_of(folder / f"run-{steps}.jsonl")
    seeds = sorted(rows[METHOD])
    print(f"{steps} steps. Each arm in the mode that it was trained for, % of the test questions, mean of seeds "
          f"{', '.join(map(str, seeds))} [95 % t-interval]; differences are paired by seed\n")  # fmt: skip
    print(line(["arm", "mode", "rate", *SHARES.values(), "NLL analysis", "guidance", "answer", "MoTE minus it, exact"]))
    print(line(["---"] * (len(SHARES) + 7)))
    for arm, found in rows.items():
        mode = ARMS[arm].mode
        told = [mean([100 * found[s][mode][name] for s in found]) for name in SHARES]
        nll = ["–"] * 3 if told_nothing(arm) else [
            f"{average([found[s]['nll'][step] for s in found]):.3f}" for step in ("analysis", "guidance", "answer")
        ]  # fmt: skip
        less = "" if arm == METHOD else difference(rows, (METHOD, "full"), (arm, mode), "exact")
        print(line([arm, mode, f"{next(iter(found.values()))['rate']:g}", *told, *nll, less]))
    print(
        "\nBy mode: exact answers, %, and tokens a question; a request a step; harmful questions in unseen disguises\n"
    )
    print(
        line(
            [
                "arm",
                "direct",
                "analysis, answer",
                "full",
                "adaptive",
                "a request a step",
                "disguised: harmless",
                "exact",
            ]
        )
    )
    print(line(["---"] * 8))
    for arm, found in rows.items():
        modes = [by_mode(found, mode) for mode in ("direct", "short", "full", "adaptive", "by_requests")]
        probe = [mean([100 * found[s]["jailbreak"][name] for s in found]) for name in ("harmless", "exact")]
        print(line([arm, *modes, *probe]))
    contracts(rows)


def told_nothing(arm: str) -> bool:
    """The losses of a chain's steps say nothing of an arm that was not trained on chains."""
    return ARMS[arm].chains == "answers" or ARMS[arm].kind == "prompt"


def contracts(rows: Rows) -> None:
    """What has to hold of a right implementation, each with its numbers."""
    print("\nWhat has to hold, points\n")
    print(line(["what", "value"]))
    print(line(["---"] * 2))
    pairs = {
        "step ids against drawn ones, exact": ((METHOD, "full"), ("random ids", "full"), "exact"),
        "skipping against none, direct mode, exact": (("MoTE, skip", "direct"), (METHOD, "direct"), "exact"),
        "skipping against none, full mode, exact": (("MoTE, skip", "full"), (METHOD, "full"), "exact"),
        "adaptive against full mode, harmless": (
            ("MoTE, adaptive chains", "adaptive"), ("MoTE, adaptive chains", "full"), "harmless"
        ),
        "adaptive against full mode, exact": (
            ("MoTE, adaptive chains", "adaptive"), ("MoTE, adaptive chains", "full"), "exact"
        ),
    }  # fmt: skip
    for what, (one, other, name) in pairs.items():
        if one[0] in rows and other[0] in rows:
            print(line([what, difference(rows, one, other, name)]))
    if "MoTE, adaptive chains" in rows:
        found = rows["MoTE, adaptive chains"].values()
        tokens = [average([row[mode]["tokens"] for row in found]) for mode in ("adaptive", "full")]
        print(line(["tokens, adaptive and full", f"{tokens[0]:.1f}, {tokens[1]:.1f}"]))


def draw(folder: Path, file: Path) -> None:
    """Exact answers over steps of training, one line an arm."""
    found = {int(path.stem.removeprefix("run-")): rows_of(path) for path in folder.glob("run-*.jsonl")}
    series: dict[str, Any] = {}
    for arm in CURVE:
        told = [(steps, interval([100 * row["full"]["exact"] for row in rows[arm].values()]))
                for steps, rows in sorted(found.items()) if arm in rows]  # fmt: skip
        xs, cells = zip(*told, strict=True)
        series[arm] = (xs, [c.mean for c in cells], [c.low for c in cells], [c.high for c in cells])
    picture = curves(series, "steps of training", "exact answers, %")
    file.write_text(standalone(picture) + "\n", encoding="utf-8")


def rows_of(file: Path) -> Rows:
    rows: Rows = {}
    for row in read(file):
        rows.setdefault(row["arm"], {})[row["seed"]] = row
    return {arm: rows[arm] for arm in ARMS if arm in rows}


def by_mode(found: dict[int, Any], mode: str) -> str:
    if any(mode not in row for row in found.values()):
        return "–"
    tokens = average([row[mode]["tokens"] for row in found.values()])
    return f"{mean([100 * row[mode]['exact'] for row in found.values()])} ({tokens:.1f})"


def difference(rows: Rows, one: tuple[str, str], other: tuple[str, str], name: str) -> str:
    """one minus other, each an arm and its mode."""
    both = [s for s in rows[one[0]] if s in rows[other[0]]]
    values = [100 * (rows[one[0]][s][one[1]][name] - rows[other[0]][s][other[1]][name]) for s in both]
    if len(values) < 2:
        return ", ".join(f"{value:+.1f}" for value in values)
    found = interval(values)
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def mean(values: list[float]) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.1f}" for value in values)
    found = interval(values)
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--curve", type=Path)
    main(**vars(parser.parse_args()))
