# SPDX-License-Identifier: Apache-2.0
"""Every method for experts on the small mixture, with its controls, as one table: effect on the target, on the others.

    python -m recipes.experts.train --out runs/experts
    python -m recipes.experts.compare --models runs/experts --out runs/experts/compare.jsonl     # 40 minutes; goes on
    python -m recipes.experts.compare --table runs/experts/compare.jsonl

Two models that were trained from different seeds, three target domains, three draws of the text that scores are
computed from. A unit is a model and a target (6 of them); draws are averaged within it, the interval is over units.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from anabranch.data.six_domains import DOMAINS
from anabranch.jobs.experts.rank import allowed, known, module
from anabranch.jobs.experts.text_mixture import byte_tokenizer
from anabranch.jobs.experts.texts import SHIPPED, Windows, read_windows
from anabranch.measure.intervals import interval
from anabranch.models.language.folder import hushed
from recipes.experts.arms import by_premoe, mergings, off, prunings, skippings, steerings
from recipes.experts.bench import Bench, statistics, with_gradients
from recipes.rows import read, write

MODELS, TARGETS, DRAWS = ("first", "second"), ("law", "python", "maths"), (0, 1, 2)
READ, ASKED = 60, 40
"""Windows of a domain that scores are computed from in each draw, and that losses are taken on."""
TITLES = {
    "off": "Rankings: the four highest experts off, the next ones move up",
    "prune": "Pruning: four of eight experts of every layer stay, for the target",
    "merge": "Merging: four weights left of eight in every layer, for the target",
    "steer": "Steering towards or away from the target, each with random experts in the same recipe",
    "skip": "Skipping slots",
}


def texts(draw: int) -> tuple[dict[str, Windows], dict[str, Windows]]:
    """Windows to read, from one of three parts of the training text; windows to ask, always the same."""
    data, tokenizer = [f"{domain}={SHIPPED}{domain}" for domain in DOMAINS], byte_tokenizer()
    every = read_windows(data, tokenizer, length=128, limit=READ * len(DRAWS), part="train")
    rows = slice(draw * READ, (draw + 1) * READ)
    own = {one.label: Windows(one.label, one.input_ids[rows], one.attention_mask[rows]) for one in every}
    return own, {one.label: one for one in read_windows(data, tokenizer, length=128, limit=ASKED)}


def run(bench: Bench, add: Callable[..., None]) -> None:
    """Every arm on one bench."""
    stats, seconds = statistics(bench)
    add("cost", "statistics", {}, **seconds)
    names = [name for name in known() if allowed(name, stats)]
    scores = {name: module(name).rank(stats, bench.target, bench.others) for name in names}
    for name, collect in with_gradients(bench).items():
        started = time.perf_counter()
        scores[name] = collect()
        add("cost", name, {}, seconds=time.perf_counter() - started)
    scores["random"] = torch.rand(scores["frequency"].shape, generator=bench.seed())
    for name, own in scores.items():
        add("off", name, off(bench, own))
    for name, arm in prunings(bench, scores).items():
        add("prune", name, arm())
    found, task = by_premoe(bench, {domain: module("tcess").rank(stats, domain) for domain in DOMAINS})
    add("prune", "premoe, by its library", found, retrieved=task)
    for name, arm in mergings(bench).items():
        add("merge", name, arm())
    for name, arm in steerings(bench, scores).items():
        add("steer", name, arm())
    for name, skipping in skippings(bench).items():
        change, share = skipping()
        add("skip", name, change, share=share)


def main(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    done = {(row["model"], row["target"], row["draw"]) for row in read(out) if row["group"] == "end"}
    kept = [row for row in read(out) if (row["model"], row["target"], row["draw"]) in done]
    write(out, kept)
    for name in MODELS:
        with hushed():
            model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        for target in TARGETS:
            for draw in DRAWS:
                if (name, target, draw) in done:
                    continue
                rows: list[dict[str, Any]] = []
                unit = {"model": name, "target": target, "draw": draw}

                def add(group: str, arm: str, change: dict[str, float], **more: Any) -> None:
                    rows.append(unit | {"group": group, "arm": arm, "change": change} | more)  # noqa: B023

                started = time.perf_counter()
                run(Bench(name, model, target, draw, *texts(draw)), add)
                add("end", "", {}, seconds=time.perf_counter() - started)
                write(out, rows, append=True)
                print(f"{name} {target} {draw}: {time.perf_counter() - started:.0f} s", flush=True)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown: a table a group."""
    costs = [row for row in rows if row["group"] == "cost" and row["arm"] == "statistics"]
    for group, title in TITLES.items():
        own = [row for row in rows if row["group"] == group]
        arms = list(dict.fromkeys(row["arm"] for row in own))
        lines = [(arm, *effects([row for row in own if row["arm"] == arm])) for arm in arms]
        if group == "off":
            lines.sort(key=lambda line: -line[3].mean)  # particular to the target first
        elif group in ("prune", "merge"):
            lines.sort(key=lambda line: line[1].mean)  # least lost first
        print(f"\n{title}\n\n| method | target | the other five | target minus others |\n| --- | --- | --- | --- |")
        for arm, *found in lines:
            share = [row["share"] for row in own if row["arm"] == arm and "share" in row]
            note = f" ({100 * np.mean(share):.0f} % of the slots)" if share else ""
            print(f"| {arm}{note} | " + " | ".join(shown(one) for one in found) + " |")
    if costs:
        ratio = {name: np.median([row[name] / row["forward"] for row in costs]) for name in ("routing", "outputs")}
        print(f"\nA profile takes {ratio['routing']:.2f} of a forward pass, with outputs {ratio['outputs']:.2f}.")
    tasks = [row for row in rows if "retrieved" in row]
    right = sum(row["retrieved"] == row["target"] for row in tasks)
    print(f"\nPreMoe's library found the right task in {right} of {len(tasks)} cases.")


def effects(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Intervals over units of the target's change, the others' mean change, and their difference."""
    units: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        others = np.mean([change for name, change in row["change"].items() if name != row["target"]])
        units.setdefault((row["model"], row["target"]), []).append((row["change"][row["target"]], float(others)))
    means = np.array([np.mean(draws, 0) for draws in units.values()])
    return [interval(means[:, 0]), interval(means[:, 1]), interval(means[:, 0] - means[:, 1])]


def shown(found: Any) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/experts"))
    parser.add_argument("--out", type=Path, default=Path("runs/experts/compare.jsonl"))
    parser.add_argument("--table", type=Path, help="print what a run left")
    given = parser.parse_args()
    if given.table is not None:
        table(read(given.table))
    else:
        main(given.models, given.out)
