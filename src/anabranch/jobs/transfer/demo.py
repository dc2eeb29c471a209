# SPDX-License-Identifier: Apache-2.0
"""The whole story on images that ship with the package: where sharing hurts, and what experts do about it."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch import __version__
from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.settings import DemoFlags, plain_values_of
from anabranch.jobs.transfer.arms import Arm, ArmSettings, Bench, run_arm
from anabranch.jobs.transfer.customize import customize
from anabranch.jobs.transfer.effects import (
    after_routing,
    arm_name,
    arm_seconds,
    by_arm,
    effects,
    level,
    mean_over_seeds,
)
from anabranch.jobs.transfer.measure import measure, open_corpus, run_cells
from anabranch.jobs.transfer.settings import CustomizeSettings, MeasureSettings
from anabranch.measure.intervals import Interval
from anabranch.train.publish import write_json
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

SOURCES = ("patchwork:garments", "patchwork:digits", *(f"planted:garments-{code}" for code in range(3)))
"""Two real domains, and a planted conflict: the first of them in three pixel codes."""
BATCH_SIZE = 60
NUM_EXPERTS, NUM_CLUSTERS = 5, 15
SCOPE = "autoencoder"
"""What an expert is a copy of: with a decoder in common, experts keep little of what separate models gain."""
ARMS = (
    *(("random-init", "ffn"), ("continued", "ffn"), ("separate", "ffn"), ("token-moe", "ffn")),
    *(("moce", SCOPE), ("random-clusters", SCOPE)),
)


def demo(flags: DemoFlags) -> Path:
    """Measure, train the arms, customise for every task, write the page; returns its path."""
    if flags.topic != "transfer":
        hint = did_you_mean(flags.topic, ["transfer", "erase"])
        raise UsageError(f"this is not the demo {flags.topic!r}", expected="transfer", hint=hint)
    started = time.monotonic()
    settings = MeasureSettings(
        sources=SOURCES,
        tasks=SOURCES,
        out=flags.out,
        steps=flags.steps,
        seeds=flags.seeds,
        batch_size=BATCH_SIZE,
        probe_points=2,
        resume=flags.resume,
    )
    print(f"1/3  one model a domain and one for all: {flags.seeds} seeds of {len(SOURCES) + 1} models", flush=True)
    transfer = measure(settings)
    print("2/3  experts, and the arms they are compared with", flush=True)
    result = compare(settings, budget(flags.steps), ARMS)
    print("3/3  an ordinary checkpoint for each task", flush=True)
    for spec in settings.tasks:
        out = flags.out / "customized" / spec.partition(":")[2]
        customize(CustomizeSettings(run=flags.out / "moce" / f"seed-{settings.first_seed}", task=spec, out=out))
    from anabranch.jobs.transfer.demo_page import write_demo_page

    page = write_demo_page(flags.out)
    tell(transfer, result, time.monotonic() - started, page)
    return page


def budget(steps: int) -> ArmSettings:
    """Of every arm."""
    return ArmSettings(
        steps=steps, batch_size=BATCH_SIZE, num_experts=NUM_EXPERTS, num_clusters=NUM_CLUSTERS, expert_scope=SCOPE
    )


def compare(settings: MeasureSettings, arms: ArmSettings, wanted: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Train the wanted (arm, scope) pairs for all seeds of a finished measurement; writes and returns demo.json."""
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    cells = [Arm(name, seed, scope) for seed in seeds for name, scope in wanted]
    with StopFlag() as stop, RunFolder.open(settings.out, plain_values_of(settings), resume=True) as run:
        bench = Bench(arms, open_corpus(settings), run.path)
        made_with = {"arms": asdict(arms), "measure": plain_values_of(settings), "version": __version__}
        results = run_cells(run.path / "arms", cells, run_arm, bench, made_with, settings.workers, stop)
        summary = {"sources": list(settings.sources)}
        summary |= summarise(results, [task.name for task in bench.corpus.tasks], arms)
        write_json(run.path / "demo.json", summary)
    return summary


def summarise(results: dict[str, Any], tasks: list[str], arms: ArmSettings) -> dict[str, Any]:
    table = by_arm(results)
    experts = arm_name("moce", arms.expert_scope)
    watched = [name for name in (experts, arm_name("moce-gate", arms.expert_scope), "token-moe") if name in table]
    return {
        "tasks": tasks,
        "experts": experts,
        "scope": arms.expert_scope,
        "steps": arms.steps,
        "batch_size": arms.batch_size,
        "num_experts": arms.num_experts,
        "num_clusters": arms.num_clusters,
        "num_labels": arms.num_labels,
        "seeds": sorted(table[experts]),
        "effects": effects(table, tasks),
        "effects_knn": effects(table, tasks, "knn"),
        "levels": {
            name: {
                "mean": level(table, name, tasks).as_dict(),
                "tasks": {task: level(table, name, [task]).as_dict() for task in tasks},
            }
            for name in table
        },
        "after_routing": after_routing(table, tasks, experts),
        "semantics": {name: semantics(table[name]) for name in watched},
        "load": {name: next(iter(table[name].values()))["load"] for name in watched},
        "coverage": {t: float(mean_over_seeds(table, experts, lambda r, t=t: r["coverage"][t])) for t in tasks},
        "purity": float(mean_over_seeds(table, experts, lambda r: r["purity"])),
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
        print(f"{effect['name']:<66} {found!s:<26} {effect['verdict']}")
    print(f"\n{seconds / 60:.1f} minutes. The page to look at: {page}")
