# SPDX-License-Identifier: Apache-2.0
"""Run the arms of the experiment with sub-nets on a finished measurement, and say what came out, with what it cost."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from anabranch import __version__
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.transfer.effects import Results, arm_seconds, by_arm, effects, level
from anabranch.jobs.transfer.measure import open_corpus, run_cells
from anabranch.jobs.transfer.recipe_table import arms as arm_tables
from anabranch.jobs.transfer.recipe_table import (
    cell,
    diagnosis,
    learning_curves,
    processor_time,
    scores_in_words,
    table,
)
from anabranch.jobs.transfer.sdr_arms import SdrArm, SdrArmSettings, SdrBench, run_sdr_arm
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.measure.intervals import interval
from anabranch.measure.rank import collapsed
from anabranch.train.publish import write_json
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

COMPARISONS = {
    "right sub-net over wrong ones": ("sdr", "sdr wrong"),
    "sub-nets of clusters over random ones": ("sdr", "sdr-random"),
    "sub-nets over the continued model": ("sdr", "continued"),
    "sub-nets over one model with the same batches": ("sdr", "by-cluster"),
    "batches of one cluster over mixed ones": ("by-cluster", "continued"),
    "sub-nets chosen by neighbours over the continued model": ("sdr by neighbours", "continued"),
    "the same, with all labels": ("sdr by all neighbours", "continued"),
    "the shared model beside sub-nets over the continued one": ("sdr shared", "continued"),
    "sub-nets over the shared model beside them": ("sdr", "sdr shared"),
    "few sub-nets over sixteen": ("sdr", "sdr-16"),
    "with distillation over without": ("sdr-kd", "sdr"),
    "heads of their own over common ones": ("sdr", "sdr-common-heads"),
    "progressive over all at once": ("sdr", "sdr-at-once"),
    "sub-nets over one model a cluster": ("sdr", "separate"),
    "one model a cluster over the continued model": ("separate", "continued"),
    "one model a true domain over the continued model": ("oracle", "continued"),
    "right domain's model over wrong ones": ("oracle", "oracle wrong"),
    "small crops beside the views over the continued model": ("multi-crop", "continued"),
}
ARMS = (
    *("random-init", "base", "continued", "by-cluster", "multi-crop", "sdr", "sdr-random"),
    *("sdr-16", "sdr-kd", "sdr-common-heads", "sdr-at-once", "sdr-ratio-50", "sdr-ratio-75", "separate", "oracle"),
)
DIAL = {"continued": 0, "sdr-ratio-75": 25, "sdr-ratio-50": 50, "sdr": 75, "separate": 100}
"""Percent of a split stage's channels that a model has for itself, from all shared to none."""
TOLERATED = 0.5
"""Points that a task may lose against the shared model before the transfer counts as unsafe."""


def compare_subnets(settings: MeasureSettings, budget: SdrArmSettings, wanted: Sequence[str] = ARMS) -> dict[str, Any]:
    """Train the wanted arms for all seeds of a finished measurement; writes and returns sdr.json."""
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    cells = [SdrArm(name, seed) for seed in seeds for name in wanted]
    with StopFlag() as stop, RunFolder.open(settings.out, plain_values_of(settings), resume=True) as run:
        bench = SdrBench(budget, open_corpus(settings), run.path)
        made_with = {"arms": asdict(budget), "measure": plain_values_of(settings), "version": __version__}
        results = run_cells(run.path / "arms", cells, run_sdr_arm, bench, made_with, settings.workers, stop)
        summary = summarise(results, [task.name for task in bench.corpus.tasks], budget)
        write_json(run.path / "sdr.json", summary)
    return summary


def summarise(results: dict[str, Any], tasks: list[str], budget: SdrArmSettings) -> dict[str, Any]:
    found = with_choices(by_arm(results))
    plain = {name for name in found if "account" in next(iter(found[name].values()))}
    return {
        "tasks": tasks,
        **asdict(budget),
        "seeds": sorted(next(iter(found.values()))),
        "effects": effects(found, tasks, comparisons=COMPARISONS),
        "effects_knn": effects(found, tasks, "knn", comparisons=COMPARISONS),
        "levels": {
            name: {
                "mean": level(found, name, tasks).as_dict(),
                "tasks": {task: level(found, name, [task]).as_dict() for task in tasks},
            }
            for name in found
        },
        "accounts": {name: next(iter(found[name].values()))["account"] for name in found if name in plain},
        "arm_seconds": arm_seconds(found),
        "coverage": {t: float(np.mean([r["coverage"][t] for r in found["sdr"].values()])) for t in tasks},
        "purity": {t: float(np.mean([r["purity"][t] for r in found["sdr"].values()])) for t in tasks},
        "spread": {name: over_seeds(runs, "spread") for name, runs in found.items() if has_losses(runs)},
        "ranks": {name: {seed: r["ranks"] for seed, r in found[name].items()} for name in plain},
        "regret": {
            "by votes": regret(found, tasks, lambda result: result["regret"]),
            f"by {budget.num_labels} labels": regret(found, tasks, lambda result: result["by_neighbours"]["regret"]),
            "by all labels": regret(found, tasks, lambda result: result["by_all_neighbours"]["regret"]),
        },
        "losses": {name: next(iter(runs.values()))["losses"] for name, runs in found.items() if has_losses(runs)},
        "seconds": sum(result["seconds"] for result in results.values()),
    }


def with_choices(found: Results) -> Results:
    """The same sub-nets chosen otherwise are arms of their own."""
    runs = found["sdr"].items()
    return found | {
        "sdr by neighbours": {seed: {"scores": result["by_neighbours"]["scores"]} for seed, result in runs},
        "sdr by all neighbours": {seed: {"scores": result["by_all_neighbours"]["scores"]} for seed, result in runs},
        "sdr shared": {seed: {"scores": result["shared"]} for seed, result in runs},
    }


def over_seeds(runs: dict[int, dict[str, Any]], key: str) -> float:
    return float(np.mean([result[key] for result in runs.values()]))


def has_losses(runs: dict[int, dict[str, Any]]) -> bool:
    return "losses" in next(iter(runs.values()))


def regret(found: Results, tasks: list[str], get: Callable[[dict[str, Any]], dict[str, float]]) -> dict[str, Any]:
    """Points by which the sub-net that is best on one half of the test images beats the chosen one on the other."""
    return interval([np.mean([get(result)[t] for t in tasks]) for result in found["sdr"].values()]).as_dict()


def tables(transfer: dict[str, Any], result: dict[str, Any]) -> str:
    """Everything that the recipe's README prints."""
    spent = result["accounts"]
    names = ("total_steps", "images_seen", "steps_touching_path", "images_seen_by_path")
    cost = [
        [name, *(f"{spent[name][key]:,.0f}" for key in names), f"{result['arm_seconds'][name]:.0f}"] for name in spent
    ]
    parts = [
        f"{len(result['seeds'])} seeds, {result['base_steps']} + {result['steps']} steps of {result['batch_size']} "
        f"images, {result['clusters']} sub-nets ({result['groups']} groups in each of {result['split_stages']} "
        f"stages); {scores_in_words(result)}",
        *diagnosis(transfer, result["tasks"]),
        *arm_tables(result),
        "**What it cost**: steps and images in all, and of them what reached the model that a task is given; processor "
        "seconds of the second stage with its probes, mean over seeds",
        table(["arm", "steps", "images", "steps on the path", "images on the path", "seconds"], cost),
        choice_table(result),
        f"**Safe transfer**: {harmed(result)}",
        "**How much is shared**: accuracy in percent, from all channels common to none",
        table(
            ["arm", *(name for name in DIAL if name in result["levels"])],
            [["mean over tasks", *(level_of(result, name) for name in DIAL if name in result["levels"])]],
        ),
        collapse_table(result),
        "**Learning curves**: accuracy, mean over tasks, at steps of the first stage",
        learning_curves(transfer),
        processor_time(transfer, result),
    ]
    return "\n\n".join(parts)


def level_of(result: dict[str, Any], arm: str) -> str:
    found = result["levels"][arm]["mean"]
    between = "" if found["low"] is None else f" [{found['low']:.1f}, {found['high']:.1f}]"
    return f"{found['mean']:.1f}{between}"


def choice_table(result: dict[str, Any]) -> str:
    """Is the choice a good one, and does the chosen sub-net's cluster hold the task's own kind of images?"""
    shares = [
        ["a task's images in the clusters of its sub-net", *(f"{result['coverage'][t]:.2f}" for t in result["tasks"])],
        ["the sub-net's images of the task's own domain", *(f"{result['purity'][t]:.2f}" for t in result["tasks"])],
    ]
    lost = [[name, cell(found)] for name, found in result["regret"].items()]
    return "\n\n".join(
        [
            "**The choice**: shares, mean over seeds",
            table(["share of", *result["tasks"]], shares),
            "**What a better choice would gain**: points by which the sub-net that is best on half of the test images "
            "beats the chosen one on the other half, mean over tasks",
            table(["chosen", "points"], lost),
        ]
    )


def collapse_table(result: dict[str, Any]) -> str:
    """What the monitor says of every arm, and what the spread of the embeddings would have said."""
    return "\n\n".join(
        [
            "**Collapse**: spread of the embeddings in the last steps, of the narrowest turn of each (1 healthy, 0 "
            "collapsed); directions that hold 95 % of the variance of the features; models in all seeds of which the "
            "monitor speaks, because they use fewer than half of the directions of the base",
            table(["arm", "spread", "directions, mean", "least", "collapsed"], collapse_rows(result)),
        ]
    )


def collapse_rows(result: dict[str, Any]) -> list[list[str]]:
    base, rows = result["ranks"]["base"], []
    for name, of_seed in result["ranks"].items():
        found = [count for counts in of_seed.values() for count in counts]
        narrow = sum(collapsed(count, base[seed][0]) for seed, counts in of_seed.items() for count in counts)
        spread = f"{result['spread'][name]:.2f}" if name in result["spread"] else ""
        rows.append([name, spread, f"{np.mean(found):.1f}", str(min(found)), f"{narrow} of {len(found)}"])
    return rows


def harmed(result: dict[str, Any]) -> str:
    """Safe transfer, or where it fails: tasks that lose more than half a point against the continued model."""
    fair = next(e for e in result["effects"] if (e["left"], e["right"]) == ("sdr", "continued"))
    losing = {task: found for task, found in fair["tasks"].items() if found["mean"] < -TOLERATED}
    if not losing:
        return f"No task loses more than {TOLERATED} points against the continued model, in the mean over seeds."
    listed = ", ".join(f"{task} {cell(found)}" for task, found in losing.items())
    return f"Not safe for every task: more than {TOLERATED} points below the continued model are {listed}."
