# SPDX-License-Identifier: Apache-2.0
"""The page of `measure`: a verdict a task, the transfer matrix, and why. A run that was stopped has one too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.report.figures import curves, matrix
from anabranch.report.page import Page, Section, Table, write
from anabranch.report.text import estimate, points

ENOUGH_TEST_IMAGES = 100


def ends(cells: Sequence[Sequence[dict[str, Any]]], name: str) -> list[list[float | None]]:
    """One number out of every interval of a table."""
    return [[cell[name] for cell in row] for row in cells]


def estimated(interval: dict[str, Any]) -> str:
    return estimate(interval["mean"], interval["low"], interval["high"])


def write_transfer_page(run: Path) -> Path:
    """report.html of a run of `measure`, finished or not."""
    file = run / "transfer.json"
    if not file.exists():
        return write(unfinished(run), run / "report.html")
    result = json.loads(file.read_text(encoding="utf-8"))
    page = Page(
        title="Does sharing hurt?",
        lead=transfer_lead(result),
        facts=transfer_facts(result),
        sections=transfer_sections(result),
    )
    return write(page, run / "report.html")


def unfinished(run: Path) -> Page:
    done = [json.loads(path.read_text()) for path in sorted((run / "models").glob("*.json"))]
    rows = [[cell["model"], cell["seed"], cell["steps"], cell["losses"][-1][1], cell["seconds"]] for cell in done]
    columns = ["learned from", "seed", "steps", "training loss", "seconds"]
    return Page(
        title="Does sharing hurt? (unfinished)",
        lead=[
            f"{len(done)} models are finished; no verdict follows from them yet.",
            "The same command with --resume goes on.",
        ],
        sections=[Section("Finished models", tables=[Table("Models", columns, rows)])],
    )


def transfer_lead(result: dict[str, Any]) -> list[str]:
    hurt = [task["task"] for task in result["tasks"] if task["verdict"] == "hurt by sharing"]
    total = len(result["tasks"])
    if hurt:
        first = f"One shared model hurts {len(hurt)} of {total} tasks: {', '.join(hurt)}."
    else:
        first = f"No task of {total} is shown to be hurt by one shared model at this budget."
    gap, specific = result["mean_gap_own"], result["mean_specificity"]
    return [
        first,
        f"Mean over tasks: learning from a task's own source instead of the mixture gains {estimated(gap)} points; "
        f"the matching source beats the other sources by {estimated(specific)} points "
        f"(95 % intervals over {result['seeds']} seeds).",
    ]


def transfer_facts(result: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("sources", ", ".join(f"{name} ({count:,})" for name, count in result["sources"].items())),
        ("seeds", result["seeds"]),
        ("score", result["primary"]),
        ("budget", result["budget"]),
        ("processor time", f"{result['seconds'] / 60:.1f} minutes"),
    ]


def transfer_sections(result: dict[str, Any]) -> list[Section]:
    sections = [verdicts(result), transfer_matrix(result), *few_test_images(result)]
    if result["harm"]:
        sections.append(harm_section(result))
    sections += [learning(result), why(result), second_probe(result)]
    if result["quarantine"]:
        rows = [[name, count] for name, count in result["quarantine"].items()]
        sections.append(
            Section("Unreadable images", tables=[Table("Left out", ["folder", "images"], rows)], kind="caution")
        )
    return sections


def verdicts(result: dict[str, Any]) -> Section:
    rows = [
        [
            t["task"],
            t["verdict"],
            t["cause"],
            estimated(t["gap_own"]),
            estimated(t["specificity"]),
            t["best"],
            estimated(t["ntg"]),
        ]
        for t in result["tasks"]
    ]
    columns = ["task", "verdict", "cause", "gap to own source", "specificity", "best source", "gap to best source"]
    notes = [
        "gap to own source: accuracy after learning from the task's own source minus after learning from all, in "
        "points.",
        "specificity: own source minus the mean of the others. Where it is not above zero, any small source would have "
        "done as well: the mixture trains more slowly, which longer training mends and experts do not.",
        "gap to best source: the source is chosen on one half of the test images and reported on the other.",
    ]
    return Section(
        "The verdict for each task",
        text=[*(task["sentence"] for task in result["tasks"]), f"Budget, {result['budget_in_words']}."],
        tables=[Table("Verdicts", columns, rows, notes)],
    )


def few_test_images(result: dict[str, Any]) -> list[Section]:
    few = {task: count for task, count in result["test_images"].items() if count < ENOUGH_TEST_IMAGES}
    if not few:
        return []
    listed = ", ".join(f"{task} ({count})" for task, count in few.items())
    text = [
        f"Few test images: {listed}. The intervals are over seeds and do not hold the uncertainty of so small a test."
    ]
    return [Section("Small tests", text=text, kind="caution")]


def transfer_matrix(result: dict[str, Any]) -> Section:
    table = result["matrix"]
    cells = table["minus_shared"]
    figure = matrix(
        *(ends(cells, name) for name in ("mean", "low", "high")),
        table["rows"][:-1],
        table["columns"],
        "Points gained over the shared model",
        row_title="learned from",
        column_title="wanted for",
    )
    rows = [
        [name, *(f"{cell['mean']:.1f}" for cell in row)]
        for name, row in zip(table["rows"], table["accuracy"], strict=True)
    ]
    floor = result["curves"]["all"]["per_task"]
    rows.append(["nothing (the floor)", *(f"{floor[task][0]:.1f}" for task in table["columns"])])
    accuracy = Table("Accuracy in percent", ["learned from", *table["columns"]], rows)
    text = [
        "Rows are what a model learned from, columns what is wanted of it. Blue: better than one model for everything; "
        "orange: worse. A blue cell on the diagonal with orange around it is semantic negative transfer."
    ]
    return Section("What each source is good for", text=text, figures=[figure], tables=[accuracy])


def harm_section(result: dict[str, Any]) -> Section:
    figure = matrix(
        *(ends(result["harm"], name) for name in ("mean", "low", "high")),
        list(result["sources"]),
        result["matrix"]["columns"],
        "Points gained by leaving a source out",
        row_title="left out",
        column_title="wanted for",
    )
    return Section(
        "Which source harms", text=["Above zero: the task is better off without that source."], figures=[figure]
    )


def learning(result: dict[str, Any]) -> Section:
    shown = {name: curve for name, curve in result["curves"].items() if not name.startswith("without-")}
    accuracy = curves(
        {
            name: (curve["steps"], *([point[end] for point in curve["accuracy"]] for end in ("mean", "low", "high")))
            for name, curve in shown.items()
        },
        "optimiser steps",
        "accuracy, mean over tasks (%)",
        "Is the shared model still learning?",
    )
    losses = curves(
        {
            name: ([x for x, _ in curve["loss"]], [y for _, y in curve["loss"]], None, None)
            for name, curve in shown.items()
        },
        "optimiser steps",
        "training loss",
        "Training loss, first seed",
    )
    return Section(
        "Learning curves",
        text=["Where the curve of all still rises at its end, a longer run may close a gap without any expert."],
        figures=[accuracy, losses],
    )


def why(result: dict[str, Any]) -> Section:
    names = list(result["sources"])
    related = Table(
        "Share of a task's images that look like a source (nearest centroid, shared model)",
        ["task", *names],
        [
            [task, *(f"{100 * share:.0f} %" for share in row)]
            for task, row in zip(result["matrix"]["columns"], result["relatedness"], strict=True)
        ],
        [f"The most related source is also the best one for {100 * result['relatedness_agrees']:.0f} % of the tasks."],
    )
    conflict = Table(
        "Cosine between the sources' gradients at the shared model",
        ["", *names],
        [[name, *(f"{cosine:+.2f}" for cosine in row)] for name, row in zip(names, result["conflict"], strict=True)],
        ["The diagonal compares two batches of one source: a pair conflicts if it lies below both its diagonals."],
    )
    return Section("Why", tables=[related, conflict])


def second_probe(result: dict[str, Any]) -> Section:
    rows = [
        [
            task["task"],
            points(task["gap_own"]["mean"]),
            estimated(task["gap_own"]),
            estimated(task["specificity"]),
            task["verdict"],
        ]
        for task in result["knn"]["tasks"]
    ]
    columns = ["task", "gap", "gap with interval", "specificity", "verdict"]
    text = ["Nearest neighbours instead of a linear probe: a second opinion, not a second vote."]
    return Section("The same with nearest neighbours", text=text, tables=[Table("kNN", columns, rows)], kind="detail")
