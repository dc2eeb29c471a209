# SPDX-License-Identifier: Apache-2.0
"""What `policy.py` left, as tables: every arm, and MoTE minus each other arm, paired by seed.

python -m recipes.mote.table runs/mote/run-700.jsonl
"""

import sys
from pathlib import Path
from typing import Any

from anabranch.measure.intervals import interval
from recipes.mote.policy import read

METHOD = "MoTE"
SHARES = {
    "exact": "exact",
    "whole_chain": "whole chain",
    "harmless": "harmless",
    "right_alternative": "refused, right words",
    "helpful": "helpful",
    "malformed": "malformed",
}


def main(file: Path) -> None:
    rows: dict[str, dict[int, Any]] = {}
    for row in read(file):
        rows.setdefault(row["arm"], {})[row["seed"]] = row
    seeds = sorted(rows[METHOD])
    print(f"Full chains, % of the test questions, mean of seeds {', '.join(map(str, seeds))} [95 % t-interval]\n")
    print(line(["arm", "rate", *SHARES.values(), "NLL analysis", "guidance", "answer", "MoTE minus it, exact"]))
    print(line(["---"] * (len(SHARES) + 6)))
    for arm, found in rows.items():
        told = [mean([100 * found[s]["full"][name] for s in seeds if s in found]) for name in SHARES]
        nll = [f"{average([found[s]['nll'][step] for s in found]):.3f}" for step in ("analysis", "guidance", "answer")]
        less = "" if arm == METHOD else difference(rows, arm, "full", seeds)
        print(line([arm, f"{next(iter(found.values()))['rate']:g}", *told, *nll, less]))
    print("\nBy mode: exact answers, %, and tokens a question; harmful questions in disguises that no chain had\n")
    print(line(["arm", *("direct", "analysis, answer", "full", "adaptive"), "jailbreak: harmless", "jailbreak: exact"]))
    print(line(["---"] * 7))
    for arm, found in rows.items():
        modes = [by_mode(found, mode) for mode in ("direct", "short", "full", "adaptive")]
        probe = [mean([100 * found[s]["jailbreak"][name] for s in found]) for name in ("harmless", "exact")]
        print(line([arm, *modes, *probe]))


def by_mode(found: dict[int, Any], mode: str) -> str:
    tokens = average([row[mode]["tokens"] for row in found.values()])
    return f"{mean([100 * row[mode]['exact'] for row in found.values()])} ({tokens:.1f})"


def difference(rows: dict[str, dict[int, Any]], arm: str, mode: str, seeds: list[int]) -> str:
    both = [s for s in seeds if s in rows[arm]]
    values = [100 * (rows[METHOD][s][mode]["exact"] - rows[arm][s][mode]["exact"]) for s in both]
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
    main(Path(sys.argv[1]))
