# SPDX-License-Identifier: Apache-2.0
"""The recipe's table, from what `recipe.py` left: one row an arm and policy, bases in columns, contract at the end.

python -m recipes.geom_erasing.table runs/geom-erasing
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.jobs.erase.garment_arms import ARMS
from anabranch.measure.concept_ratio import mcnemar, paired_difference, wilson
from anabranch.measure.intervals import interval

MUST = 0.6
"""ICR(boxes) over that of name only and of shuffled boxes, at most."""
SHOWN = 0.01
"""Chance, by McNemar's test, at which a difference is taken for one."""


def main(out: Path) -> None:
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in out.glob("seed-*"))
    found = {seed: {file.stem: read(file) for file in (out / f"seed-{seed}").glob("*.json")} for seed in seeds}
    print(f"ICR in %, n = {count(found)} pictures a base and row; bases {', '.join(map(str, seeds))}\n")
    heads = [
        *(f"base {seed}" for seed in seeds),
        "mean",
        "broken ones too",
        "other detector",
        "right garment",
        "Frechet",
    ]
    print(row(["arm", "negative", *heads, "mark at the place asked for"]))
    print(row(["---"] * (4 + len(heads) - 1)))
    for arm in ARMS:
        for policy in policies(found, arm):
            print(row([arm, policy, *cells(found, seeds, arm, policy)]))
    print()
    for line in contract(found, seeds):
        print(f"* {line}")
    evaluated = {folder.name.removeprefix("eval-"): evaluation(folder) for folder in sorted(out.glob("eval-*"))}
    if evaluated:
        print()
        attacks(evaluated)


def attacks(evaluated: dict[str, Any]) -> None:
    """A row an attack: the erased model, the model before, and the one that never saw the mark, base by base."""
    print(row(["attack", *(f"base {name}: erased (before, never)" for name in evaluated)]))
    print(row(["---"] * (1 + len(evaluated))))
    plain = [rates(e["arms"]["erased"]["icr"], e["arms"]["before"]["icr"], e["arms"]["never"]["icr"])
             for e in evaluated.values()]  # fmt: skip
    print(row(["none", *plain]))
    for attack in next(iter(evaluated.values()))["attacks"]:
        found = [e["attacks"][attack] for e in evaluated.values()]
        print(row([attack, *(rates(f["erased"], f["before"], f["never"]) for f in found)]))
    print(row(["verdict", *(e["verdict"]["level"] for e in evaluated.values())]))


def evaluation(folder: Path) -> dict[str, Any]:
    """eval.json, with the attacks that were made in a run of their own beside the others."""
    told, later = read(folder / "eval.json"), folder / "adversarial.json"
    if later.exists():
        told["attacks"] |= read(later)["attacks"]
    return told


def rates(erased: dict[str, float], before: dict[str, float], never: dict[str, float]) -> str:
    low, rate, high = (f"{100 * erased[end]:.1f}" for end in ("low", "rate", "high"))
    return f"{rate} [{low}, {high}] ({100 * before['rate']:.0f}, {100 * never['rate']:.0f})"


def read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def count(found: dict[int, Any]) -> int:
    return len(next(iter(next(iter(next(iter(found.values())).values()))["policies"].values()))["hits"])


def policies(found: dict[int, Any], arm: str) -> list[str]:
    return list(next((arms[arm]["policies"] for arms in found.values() if arm in arms), {}))


def bits(found: dict[int, Any], seed: int, arm: str, policy: str, which: str = "hits") -> np.ndarray | None:
    told = found[seed].get(arm, {"policies": {}})["policies"].get(policy, {})
    return np.array([int(bit) for bit in told[which]]) if which in told else None


def cells(found: dict[int, Any], seeds: list[int], arm: str, policy: str) -> list[str]:
    hits = [bits(found, seed, arm, policy) for seed in seeds]
    rates = ["–" if h is None else percent(h) for h in hits]
    known = [found[seed][arm] for seed in seeds if arm in found[seed]]
    broken, second = (shares(found, seeds, arm, policy, which) for which in ("broken", "second"))
    right = [100 * arms["policies"][policy]["right"] for arms in known]
    distance = [arms["policies"][policy]["frechet"] for arms in known]
    control = [arms["place_control"] for arms in known if arms["place_control"]]
    there = [f"{100 * c['drawn']:.0f} / {100 * c['in_place']:.0f}" for c in control] if policy == "none" else []
    means = [100 * h.mean() for h in hits if h is not None]
    return [
        *rates,
        spread(means),
        spread(broken),
        spread(second),
        spread(right),
        spread(distance, 2),
        ", ".join(there) or "–",
    ]


def shares(found: dict[int, Any], seeds: list[int], arm: str, policy: str, which: str) -> list[float]:
    hits = [bits(found, seed, arm, policy, which) for seed in seeds]
    return [100 * float(h.mean()) for h in hits if h is not None]


def percent(hits: np.ndarray) -> str:
    rate = wilson(int(hits.sum()), len(hits))
    return f"{100 * rate.rate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def spread(values: list[float], digits: int = 1) -> str:
    """The mean over bases with its interval; alone while there are fewer than three."""
    if len(values) < 3:
        return "–" if not values else ", ".join(f"{value:.{digits}f}" for value in values)
    found = interval(values)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def contract(found: dict[int, Any], seeds: list[int]) -> list[str]:
    """What was asked for before the table was made, base by base."""
    lines = [line for seed in seeds for line in full_recall(found, seed)]
    for seed in seeds:
        if not {"boxes", "name", "shuffled", "plain"} <= found[seed].keys():
            continue
        control = found[seed]["boxes"]["place_control"]
        boxes, name, deal = (bits(found, seed, arm, "name") for arm in ("boxes", "name", "shuffled"))
        plain, word = (bits(found, seed, "plain", policy) for policy in ("none", "word"))
        right = [found[seed][arm]["policies"][p]["right"] for arm, p in (("boxes", "name"), ("plain", "none"))]
        checks = {
            f"place control {control['drawn']:.2f} drawn, {control['in_place']:.2f} in place": min(
                control["drawn"], control["in_place"]
            )
            >= 0.9,
            f"boxes / name only {boxes.mean() / name.mean():.2f} (p = {mcnemar(name, boxes):.1e})": boxes.mean()
            <= MUST * name.mean(),
            f"boxes / shuffled {boxes.mean() / deal.mean():.2f} (p = {mcnemar(deal, boxes):.1e})": boxes.mean()
            <= MUST * deal.mean(),
            f"the untrained word {100 * (word.mean() - plain.mean()):+.1f} points": word.mean() >= plain.mean() - 0.06,
            f"right garment {100 * (right[0] - right[1]):+.1f} points": right[0] >= right[1] - 0.05,
        }
        said = "; ".join(f"{what}: {'holds' if holds else '**does not hold**'}" for what, holds in checks.items())
        gain = paired_difference(name, boxes)
        lines.append(f"base {seed}: {said}; paired gain of boxes over the name {100 * gain.difference:+.1f} points "
                     f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]")  # fmt: skip
    return lines


def full_recall(found: dict[int, Any], seed: int) -> list[str]:
    """The same comparison where the detector of the labels misses nothing."""
    lines, boxes = [], bits(found, seed, "boxes, recall 1", "name")
    for control in ("name", "shuffled"):
        other = bits(found, seed, f"{control}, recall 1", "name")
        if boxes is not None and other is not None:
            gain = paired_difference(other, boxes)
            chance, small = mcnemar(other, boxes), boxes.mean() <= MUST * other.mean()
            holds = "holds" if small and chance < SHOWN else "**not shown**" if small else "**does not hold**"
            points = f"{100 * gain.difference:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
            told = f"boxes / {control} {boxes.mean() / other.mean():.2f} (p = {chance:.1e}): {holds}"
            lines.append(f"base {seed}, recall 1: {told}; paired gain {points}")
    return lines


def row(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
