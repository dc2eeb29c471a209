# SPDX-License-Identifier: Apache-2.0
"""MoTE against its controls on PolicyWorld: every arm, several seeds, learning rates tuned on seeds of their own.

    python -m recipes.mote.policy tune --seeds 900 901 --out runs/mote          # which rate for which arm
    python -m recipes.mote.policy run --seeds 0 1 2 3 4 --steps 700 --out runs/mote

A line a trained model in OUT/*.jsonl; what is there is not made again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anabranch.jobs.align.policy_arms import ARMS, Arm, Bench, evaluate, train_arm
from recipes.rows import read, write

RATES = (0.01, 0.02, 0.03, 0.05)


def main(what: str, seeds: list[int], steps: int, arms: list[str], rates: list[float], out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{what}-{steps}.jsonl"
    done = {key(row) for row in read(file)}
    best = tuned(out, steps) if what == "run" else {}
    if what == "run" and (missing := [name for name in arms if name not in best and ARMS[name].kind != "prompt"]):
        print(f"not tuned at {steps} steps, rates as they stand in ARMS: {', '.join(missing)}")
    for seed in seeds:
        bench = Bench(seed=seed, steps=steps)
        for name, arm in planned(what, arms, rates, best):
            row: dict[str, Any] = {"arm": name, "seed": seed, "steps": steps, "rate": arm.learning_rate}
            if key(row) in done:
                continue
            trained = train_arm(bench, arm)
            last = trained.losses[-20:]
            row |= {
                "loss": sum(last) / max(1, len(last)),
                **evaluate(bench, trained, own=arm.mode, only=arm.mode if what == "tune" else ""),
            }
            write(file, [row], append=True)
            print(
                f"seed {seed}  {name}  rate {arm.learning_rate}  exact {100 * row[arm.mode]['exact']:.1f}", flush=True
            )


def planned(what: str, arms: list[str], rates: list[float], best: dict[str, float]) -> Iterator[tuple[str, Arm]]:
    for name in arms:
        for rate in rates if what == "tune" else [best.get(name, ARMS[name].learning_rate)]:
            yield name, replace(ARMS[name], learning_rate=rate)


def tuned(out: Path, steps: int) -> dict[str, float]:
    """The rate of each arm with the best mean share of exact answers over the tuning seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in read(out / f"tune-{steps}.jsonl"):
        found.setdefault((row["arm"], row["rate"]), []).append(row[ARMS[row["arm"]].mode]["exact"])
    best: dict[str, tuple[float, float]] = {}
    for (arm, rate), scores in found.items():
        best[arm] = max(best.get(arm, (-1.0, 0.0)), (sum(scores) / len(scores), rate))
    return {arm: rate for arm, (_, rate) in best.items()}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["seed"], row["steps"], row["rate"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tune", "run"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="to tune over")
    parser.add_argument("--out", type=Path, default=Path("runs/mote"))
    main(**vars(parser.parse_args()))
