# SPDX-License-Identifier: Apache-2.0
"""The whole story on images that ship with the package: where sharing hurts, and what experts do about it."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch import __version__
from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.arms import Arm, ArmSettings, Bench, run_arm
from anabranch.jobs.customize import customize
from anabranch.jobs.effects import after_routing, arm_seconds, by_arm, effects, level, mean_over_seeds
from anabranch.jobs.measure import _plain, measure, open_corpus, run_cells, write_json
from anabranch.jobs.settings import CustomizeSettings, DemoFlags, MeasureSettings
from anabranch.measure.intervals import Interval
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

ARMS = ("random-init", "continued", "moce", "random-clusters", "token-moe", "separate", "oracle")
DOMAINS = ("garments", "animals", "digits", "textures")
BATCH_SIZE = 64
NUM_EXPERTS, NUM_CLUSTERS = 4, 12


def demo(flags: DemoFlags) -> Path:
    """Measure, train the arms, customise for every task, write the page; returns its path."""
    if flags.topic != "transfer":
        raise UsageError(f"there is no demo {flags.topic!r}", hint=did_you_mean(flags.topic, ["transfer"]))
    started = time.monotonic()
    settings = MeasureSettings(
        sources=tuple(f"patchwork:{name}" for name in DOMAINS),
        tasks=tuple(f"patchwork:{name}" for name in DOMAINS),
        out=flags.out,
        steps=flags.steps,
        seeds=flags.seeds,
        batch_size=BATCH_SIZE,
        resume=flags.resume,
    )
    print(f"1/3  one model a domain and one for all: {flags.seeds} seeds of {len(DOMAINS) + 1} models", flush=True)
    transfer = measure(settings)
    budget = ArmSettings(steps=flags.steps, batch_size=BATCH_SIZE, num_experts=NUM_EXPERTS, num_clusters=NUM_CLUSTERS)
    print("2/3  experts, and the arms they are compared with", flush=True)
    result = compare(settings, budget, [(name, "ffn") for name in ARMS])
    print("3/3  an ordinary checkpoint for each task", flush=True)
    for spec in settings.tasks:
        out = flags.out / "customized" / spec.partition(":")[2]
        customize(CustomizeSettings(run=flags.out / "moce" / f"seed-{settings.first_seed}", task=spec, out=out))
    from anabranch.jobs.demo_page import write_demo_page

    page = write_demo_page(flags.out)
    tell(transfer, result, time.monotonic() - started, page)
    return page


def compare(settings: MeasureSettings, arms: ArmSettings, wanted: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Train the wanted (arm, scope) pairs for all seeds of a finished measurement; writes and returns demo.json."""
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    cells = [Arm(name, seed, scope) for seed in seeds for name, scope in wanted]
    with StopFlag() as stop, RunFolder.open(settings.out, _plain(settings), resume=True) as run:
        bench = Bench(arms, open_corpus(settings), run.path)
        made_with = {"arms": asdict(arms), "measure": _plain(settings), "version": __version__}
        results = run_cells(run.path / "arms", cells, run_arm, bench, made_with, settings.workers, stop)
        summary = summarise(results, [task.name for task in bench.corpus.tasks], arms)
        write_json(run.path / "demo.json", summary)
    return summary


def summarise(results: dict[str, Any], tasks: list[str], arms: ArmSettings) -> dict[str, Any]:
    table = by_arm(results)
    watched = [name for name in ("moce", "moce-gate", "token-moe") if name in table]
    moce = table["moce"]
    return {
        "tasks": tasks,
        "steps": arms.steps,
        "batch_size": arms.batch_size,
        "num_experts": arms.num_experts,
        "num_clusters": arms.num_clusters,
        "num_labels": arms.num_labels,
        "seeds": sorted(moce),
        "effects": effects(table, tasks),
        "effects_knn": effects(table, tasks, "knn"),
        "levels": {
            name: {
                "mean": level(table, name, tasks).as_dict(),
                "tasks": {task: level(table, name, [task]).as_dict() for task in tasks},
            }
            for name in table
        },
        "after_routing": after_routing(table, tasks),
        "semantics": {name: semantics(table[name]) for name in watched},
        "load": {name: next(iter(table[name].values()))["load"] for name in watched},
        "coverage": {task: float(mean_over_seeds(table, "moce", lambda r, t=task: r["coverage"][t])) for task in tasks},
        "purity": float(mean_over_seeds(table, "moce", lambda r: r["purity"])),
        "losses": {name: next(iter(found.values()))["losses"] for name, found in table.items() if has_losses(found)},
        "arm_seconds": arm_seconds(table),
        "seconds": sum(result["seconds"] for result in results.values()),
    }


def has_losses(found: dict[int, dict[str, Any]]) -> bool:
    return "losses" in next(iter(found.values()))


def semantics(found: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over seeds, layer by layer."""
    first = next(iter(found.values()))["semantics"]
    return {
        layer: {
            name: sum(result["semantics"][layer][name] for result in found.values()) / len(found)
            for name, value in values.items()
            if isinstance(value, float)
        }
        for layer, values in first.items()
    }


def tell(transfer: dict[str, Any], result: dict[str, Any], seconds: float, page: Path) -> None:
    print()
    for task in transfer["tasks"]:
        print(task["sentence"])
    print()
    for effect in result["effects"]:
        found = Interval(effect["mean"], effect["low"] or float("nan"), effect["high"] or float("nan"), effect["count"])
        print(f"{effect['name']:<52} {found!s:<26} {effect['verdict']}")
    print(f"\n{seconds / 60:.1f} minutes. The page to look at: {page}")
