# SPDX-License-Identifier: Apache-2.0
"""The results of a measurement and its arms as Markdown tables."""

from collections.abc import Sequence
from typing import Any


def cell(interval: dict[str, Any], digits: int = 2) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:+.{digits}f}"
    return f"{interval['mean']:+.{digits}f} [{interval['low']:+.{digits}f}, {interval['high']:+.{digits}f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(transfer: dict[str, Any], result: dict[str, Any]) -> str:
    """Verdicts, matrix, arms, differences, routing semantics and learning curves."""
    parts = [
        f"{len(result['seeds'])} seeds, {result['steps']} + {result['steps']} steps of {result['batch_size']} images, "
        f"{result['num_experts']} experts, {result['num_clusters']} clusters; {scores_in_words(result)}",
        *diagnosis(transfer, result["tasks"]),
        *arms(result),
        "**What the routers look at** (mean over seeds)",
        table(
            ["router", "layer", "NMI with cluster", "NMI with domain", "tokens agreeing", "R² on patch look"],
            [
                [name, layer, *(f"{v[key]:.2f}" for key in ("nmi_cluster", "nmi_label", "token_agreement", "pixel_r2"))]
                for name, layers in result["semantics"].items()
                for layer, v in layers.items()
            ],
        ),
        f"Purity of the groups {result['purity']:.2f}; share of a task's images that take its route: "
        + ", ".join(f"{task} {share:.2f}" for task, share in result["coverage"].items()),
        "**Learning curves**: accuracy, mean over tasks, at steps of the first stage",
        learning_curves(transfer),
        processor_time(transfer, result),
    ]
    return "\n\n".join(parts)


def scores_in_words(result: dict[str, Any]) -> str:
    return f"linear probe with {result['num_labels']} labels; points, 95 % t-intervals over seeds, paired."


def processor_time(transfer: dict[str, Any], result: dict[str, Any]) -> str:
    return f"Processor time: {(transfer['seconds'] + result['seconds']) / 60:.0f} minutes in all."


def diagnosis(transfer: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """Where sharing hurts: the verdict for each task, the matrix, and harm where it was measured."""
    keys = ("task", "verdict", "cause", "gap_own", "specificity", "best", "ntg")
    rows = [[cell(t[key]) if isinstance(t[key], dict) else t[key] for key in keys] for t in transfer["tasks"]]
    mean = ["mean", "", "", cell(transfer["mean_gap_own"]), cell(transfer["mean_specificity"]), "", ""]
    parts = [
        "**Verdict for each task** (" + transfer["budget_in_words"] + ")",
        table(["task", "verdict", "cause", "gap_own", "specificity", "best source", "NTG"], [*rows, mean]),
        "**Transfer matrix**: accuracy in percent, rows learned from, columns wanted",
        matrix(transfer),
    ]
    if transfer["harm"]:
        harm = [[name, *map(cell, row)] for name, row in zip(transfer["sources"], transfer["harm"], strict=True)]
        parts += ["**Harm**: points gained by leaving a source out", table(["left out", *tasks], harm)]
    return parts


def arms(result: dict[str, Any]) -> list[str]:
    """What was gained over what, and the level of every arm."""
    tasks = result["tasks"]
    differences = [
        [
            e["name"],
            f"{e['left']} - {e['right']}",
            cell(e),
            e["verdict"],
            cell(k),
            *(cell(e["tasks"][t]) for t in tasks),
        ]
        for e, k in zip(result["effects"], result["effects_knn"], strict=True)
    ]
    levels = [
        [name, f"{level['mean']['mean']:.1f}", *(f"{level['tasks'][t]['mean']:.1f}" for t in tasks)]
        for name, level in result["levels"].items()
    ]
    return [
        "**Differences between arms** (mean over tasks first; primary score)",
        table(["difference", "arms", "mean", "verdict", "kNN", *tasks], differences),
        "**Every arm**: accuracy in percent",
        table(["arm", "mean", *tasks], levels),
    ]


def matrix(transfer: dict[str, Any]) -> str:
    return table(
        ["learned from", *transfer["matrix"]["columns"]], [[name, *row] for name, row in matrix_rows(transfer)]
    )


def matrix_rows(transfer: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(what a model learned from, its accuracy on every task), in words."""
    found = transfer["matrix"]
    rows = zip(found["rows"], found["accuracy"], strict=True)
    return [(name, [f"{c['mean']:.1f}" for c in row]) for name, row in rows]


def learning_curves(transfer: dict[str, Any]) -> str:
    shown = {name: curve for name, curve in transfer["curves"].items() if not name.startswith("without-")}
    steps = shown["all"]["steps"]  # the only curve that begins before anything was learned
    rows = []
    for name, curve in shown.items():
        at = {step: f"{point['mean']:.1f}" for step, point in zip(curve["steps"], curve["accuracy"], strict=True)}
        rows.append([name, *(at.get(step, "") for step in steps)])
    return table(["learned from", *map(str, steps)], rows)
