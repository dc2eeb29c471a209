# SPDX-License-Identifier: Apache-2.0
"""The results of the jobs in one form: from what a job returns, or from the folder of a finished run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, UsageError
from anabranch.report.result import Estimate, Result, Results
from anabranch.train.publish import read_json

BASE, BEFORE = "base", "before"


def results(run: str | Path) -> Results:
    """What a finished run found, with tables.

    run    a folder that measure, erase eval, align eval, demo TOPIC or a recipe wrote, or the file of experts rank.

    Raises:
        UsageError: nothing of these, or not finished.
    """
    path = Path(run)
    if path.is_file():
        found = read(path)
        if "rankings" not in found:
            raise UsageError(f"{path} holds no results", expected="the --out file of anabranch experts rank")
        return ranked(found)
    for name, make in FILES.items():
        if (path / name).is_file():
            return make(path, read(path / name))
    received = "no such folder" if not path.is_dir() else "a folder without any of them, or an unfinished run"
    raise UsageError(f"{path} holds no results", expected=f"one of {', '.join(FILES)}", received=received)


def read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except AnabranchError as error:
        raise UsageError(f"{file} cannot be read", expected="JSON as a job wrote it", received=error) from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} cannot be read", expected="a JSON object", received=type(found).__name__)
    return found


# One job each ---------------------------------------------------------------------------------------------------------


def measured(found: Mapping[str, Any]) -> Results:
    """Of `measure`: the transfer matrix, the accuracies under it, a verdict for each task."""
    matrix = found["matrix"]
    tasks = list(matrix["columns"])
    gained = [
        [name, *map(Estimate.of, row)] for name, row in zip(matrix["rows"][:-1], matrix["minus_shared"], strict=True)
    ]
    accuracy = [
        [name, *(Estimate.of(one, signed=False) for one in row)]
        for name, row in zip(matrix["rows"], matrix["accuracy"], strict=True)
    ]
    verdicts = [
        [
            task["task"], task["verdict"], task["cause"], Estimate.of(task["gap_own"]),
            Estimate.of(task["specificity"]), task["best"], Estimate.of(task["ntg"]),
        ]
        for task in found["tasks"]
    ]  # fmt: skip
    columns = ["task", "verdict", "cause", "gap to own source", "specificity", "best source", "gap to best source"]
    note = f"95 % intervals over {found['seeds']} seeds; {found['budget_in_words']}."
    learned = ["learned from", *tasks]
    return Results(
        found,
        {
            "matrix": Result("Points gained over the shared model", learned, gained, [note], "matrix"),
            "verdicts": Result("The verdict for each task", columns, verdicts, [note]),
            "accuracy": Result("Accuracy, %", learned, accuracy, [note], "matrix"),
        },
    )


def compared(measured_too: Results, found: Mapping[str, Any]) -> Results:
    """Of `demo transfer` and the recipes: what arms gain over others, and their levels."""
    effects = [[one["name"], Estimate.of(one), one["verdict"]] for one in found["effects"]]
    levels = [[arm, Estimate.of(one["mean"], signed=False)] for arm, one in found["levels"].items()]
    note = f"{len(found['seeds'])} seeds, paired; mean over tasks, 95 % intervals."
    tables = {
        "effects": Result("Differences between arms", ["difference", "points", "verdict"], effects, [note]),
        "arms": Result("Every arm", ["arm", "accuracy, %"], levels, [note]),
    }
    return Results({**found, "transfer": dict(measured_too)}, tables | measured_too.tables)


def ranked(found: Mapping[str, Any]) -> Results:
    """Of `experts rank`: the highest experts of every ranking, how far rankings agree, the scores."""
    rankings = found["rankings"]
    places = range(len(next(iter(rankings.values()))["top"]))
    kept = [
        [name, *(f"{layer}.{e} ({100 * share:.0f})" for (layer, e), share in zip(one["top"], one["kept"], strict=True))]
        for name, one in rankings.items()
    ]
    overlap = [
        [name, *(Estimate(100 * share, signed=False, digits=0) for share in row.values())]
        for name, row in found["overlap"].items()
    ]
    scores = [
        [name, f"{layer}.{e}", Estimate(one["scores"][layer][e], *ends, signed=False, digits=4)]
        for name, one in rankings.items()
        for (layer, e), ends in zip(one["top"], one["intervals"], strict=True)
    ]
    title, columns = f"The experts that belong most to {found['target']}", ["ranking", *(str(i + 1) for i in places)]
    note = "layer.expert, and in brackets in how many of 100 resamplings it is among the highest"
    return Results(
        found,
        {
            "experts": Result(title, columns, kept, [note]),
            "overlap": Result("Experts that two rankings share, %", ["ranking", *rankings], overlap, layout="matrix"),
            "scores": Result("Scores of the highest", ["ranking", "expert", "score"], scores),
        },
    )


def erased(found: Mapping[str, Any]) -> Results:
    """Of `erase eval`: how often each arm draws the concept, and what attacks bring back."""
    arms = dict(found["arms"])
    arms |= {f"policy {name}": row for name, row in found["policies"].items() if name != found["policy"]}
    rows = [drawn(arm, row, arm == BEFORE) for arm, row in arms.items()]
    asked = ["erased", BEFORE, "never"]
    who = [name for name in asked if any(name in row for row in found["attacks"].values())]
    attacks = [[name, *(percent(row.get(one)) for one in who)] for name, row in found["attacks"].items()]
    tables = {"arms": Result(f"How often {found['concept']} is drawn", DRAWN, rows, verdict_notes(found))}
    if attacks and who:
        tables["attacks"] = Result("Under attack, drawn in %", ["attack", *who], attacks)
    return Results(found, tables)


DRAWN = ["arm", "pictures", "drawn, %", "minus before, points"]


def drawn(arm: str, row: Mapping[str, Any], is_start: bool) -> list[object]:
    change = None if is_start else row.get("minus_before")
    return [arm, row["icr"]["count"], percent(row["icr"]), Estimate.of(change, scale=100)]


def verdict_notes(found: Mapping[str, Any]) -> list[str]:
    verdict = found["verdict"]
    if verdict is None:
        return ["No eraser was given."]
    return [f"{'void' if verdict['void'] else verdict['level']}: {'; '.join(verdict['reasons'])}."]


def erase_demonstrated(found: Mapping[str, Any]) -> Results:
    """Of `demo erase`."""
    rows = [
        drawn(f"{arm}, {policy}", row, (arm, policy) == (BEFORE, "none"))
        for arm, policies in found["arms"].items()
        for policy, row in policies.items()
    ]
    rivals = [[f"boxes minus {arm}", Estimate.of(row, scale=100)] for arm, row in found["boxes_minus"].items()]
    controls = Result("Do places matter? The arm with boxes minus the controls", ["difference", "points"], rivals)
    return Results(found, {"arms": Result("How often the mark is drawn", DRAWN, rows), "controls": controls})


def aligned(found: Mapping[str, Any]) -> Results:
    """Of `align eval`: what belongs together, and the same against the base."""
    arms = found["arms"]
    names = [name for name, one in next(iter(arms.values())).items() if one is None or isinstance(one, dict)]
    names = [name for name in names if name != "shapes" and any(row[name] is not None for row in arms.values())]
    rates = [[arm, *(percent(row[name]) for name in names), row["tokens"]] for arm, row in arms.items()]
    changes = [
        [arm, *(Estimate.of((row[name] or {}).get("minus_base"), scale=100) for name in names)]
        for arm, row in arms.items()
        if arm != BASE
    ]
    tables = {"arms": Result("Per cent of the answers", ["arm", *names, "tokens"], rates, found["warnings"])}
    if changes:
        tables["differences"] = Result("Points against the base", ["arm", *names], changes)
    return Results(found, tables)


def percent(rate: Mapping[str, Any] | None) -> Estimate:
    return Estimate.of(rate, signed=False, scale=100)


# Files of a run -------------------------------------------------------------------------------------------------------


def of_demo(folder: Path, found: dict[str, Any]) -> Results:
    if found.get("topic") == "erase":
        return erase_demonstrated(found)
    return compared(measured(read(folder / "transfer.json")), found)


def of_eval(folder: Path, found: dict[str, Any]) -> Results:
    return erased(found) if "concept" in found else aligned(found)


def of_experts_demo(folder: Path, found: dict[str, Any]) -> Results:
    labels: Sequence[str] = found["labels"]
    worth = [
        [f"{row['layer']}.{row['expert']}", *(Estimate.of(row["change"][label]) for label in labels)]
        for row in found["off"]
    ]
    title = "What every text loses without an expert, thousandths of a nat a byte"
    return Results(found, {"experts": Result(title, ["expert", *labels], worth, layout="matrix")})


FILES: dict[str, Callable[[Path, dict[str, Any]], Results]] = {
    "demo.json": of_demo,
    "transfer.json": lambda folder, found: measured(found),
    "eval.json": of_eval,
    "align-demo.json": lambda folder, found: aligned(found["eval"]),
    "experts-demo.json": of_experts_demo,
}
"""What to look for in a folder, in this order; of demo transfer, both of the first two are there."""
