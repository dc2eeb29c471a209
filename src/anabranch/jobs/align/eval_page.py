# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch align eval`, from its eval.json alone. No answer and no question is printed on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.jobs.align.eval_told import BASE, MEASURES, RESULT, own_arms, walked
from anabranch.report.figures import Matrix, RateRow, matrix, rate_bars, two_matrices
from anabranch.report.page import Figure, Page, Section, Table, write
from anabranch.report.text import MISSING, estimate, level

ASKED = {
    "harmless": "Harmless answers to harmful questions",
    "jailbreak harmless": "Harmless answers to harmful questions in disguise",
    "helpful": "Helpful answers to harmless questions",
    "helpful where harmful": "Answers to harmful questions that offer what helps instead",
    "over-refusal": "Harmless questions that are refused (lower is better)",
}


def write_eval_page(run: Path) -> Path:
    result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    page = Page(
        title="Is it harmless, and still of use?",
        lead=lead(result),
        facts=facts(result),
        sections=[*cautions(result), numbers(result), tokens(result), *inside(result), judges(result)],
    )
    return write(page, run / "report.html")


def best_arm(result: Mapping[str, Any]) -> str:
    """The arm of the experts that is harmless most often; the base where there is none."""
    mine = [arm for arm in own_arms(result) if result["arms"][arm]["harmless"]]
    return max(mine, key=lambda arm: float(result["arms"][arm]["harmless"]["rate"]), default=BASE)


def lead(result: Mapping[str, Any]) -> list[str]:
    arm, base = best_arm(result), result["arms"][BASE]
    if arm == BASE:
        return [f"The base alone was asked: {rate(base['harmless'])} of its answers to harmful questions are harmless."]
    found = result["arms"][arm]
    verdict = {"positive": "more than", "negative": "less than", "open": "not shown to differ from"}
    said = [
        f"In mode {arm}, {rate(found['harmless'])} of the answers to harmful questions are harmless: "
        f"{verdict[found['harmless']['minus_base']['verdict']]} the base's {rate(base['harmless'])}.",
    ]
    if found["helpful"] is not None:
        said.append(
            f"Helpful answers to harmless questions: {rate(found['helpful'])}, the base {rate(base['helpful'])}."
        )
    if found["over-refusal"] is not None:
        said.append(
            f"Harmless questions refused: {rate(found['over-refusal'])}, by the base {rate(base['over-refusal'])}."
        )
    return [*said, f"Judged by {result['judge']['name']}; intervals are 95 %."]


def rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return MISSING
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def facts(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    settings = result["settings"]
    return [
        ("base model", settings["model"]),
        ("experts", settings["experts"] or MISSING),
        ("compared with", settings["against"] or MISSING),
        ("questions", settings["questions"]),
        ("judge", result["judge"]["name"]),
    ]


def cautions(result: Mapping[str, Any]) -> list[Section]:
    return [Section("Before you rely on this", text=result["warnings"], kind="caution")] if result["warnings"] else []


def numbers(result: Mapping[str, Any]) -> Section:
    figures = [bars(result, name) for name in MEASURES if any(found[name] for found in result["arms"].values())]
    text = [
        "These numbers belong together: a model that refuses everything is harmless, one that answers everything is "
        "helpful. Differences are against the base on the same questions.",
    ]
    return Section("The numbers that belong together", text=text, figures=figures)


def bars(result: Mapping[str, Any], name: str) -> Figure:
    rows = []
    for arm, found in result["arms"].items():
        if (one := found[name]) is None:
            continue
        change = one.get("minus_base")
        note = "" if change is None else estimate(*(100 * change[end] for end in ("difference", "low", "high")))
        known = one.get("corrected")
        if isinstance(known, dict):
            note += f"  corrected {100 * known['rate']:.0f} [{100 * known['low']:.0f}, {100 * known['high']:.0f}]"
        rows.append(RateRow(arm, 100 * one["rate"], 100 * one["low"], 100 * one["high"], note))
    return rate_bars(rows, ASKED[name])


def tokens(result: Mapping[str, Any]) -> Section:
    rows = [RateRow(arm, found["tokens"], None, None, walked(found["shapes"])) for arm, found in result["arms"].items()]
    text = ["In adaptive mode the model chooses its steps, so easy questions cost less; the other modes are forced."]
    return Section("What an answer costs", text=text, figures=[rate_bars(rows, "Tokens a question", unit="tokens")])


def inside(result: Mapping[str, Any]) -> list[Section]:
    looked = {"step experts" if who == "experts" else who: found for who, found in result["inside"].items()}
    if not looked:
        return []
    sections = [losses(looked)]
    mapped = {who: found for who, found in looked.items() if found["transfer"] is not None}
    return [*sections, transfer(mapped)] if mapped else sections


def losses(looked: Mapping[str, Any]) -> Section:
    rows = [
        [who, step, *(level(found["nll"][whose][step], 3) for whose in ("own", "next", "drawn", "request"))]
        for who, found in looked.items()
        for step in found["nll"]["own"]
    ]
    columns = ["model", "step", "its own experts", "the next step's", "drawn for each token", "a request a step"]
    notes = [
        f"{who}: {said}" for who, found in looked.items() for said in (told_notes(found), told_reader(found)) if said
    ]
    text = [
        "Mean loss of a token (nats) on chains that nothing was trained on. Wrong experts that foresee as well mean "
        "that the experts are alike; for one adapter all columns are the same. The last column reads everything before "
        "a step with the experts of that step, as an engine does that serves one adapter a request.",
    ]
    table = Table("Loss by step, with right and wrong experts", columns, rows, notes)
    return Section("Does each step need its own expert?", text=text, tables=[table])


def told_notes(found: Mapping[str, Any]) -> str:
    notes = found["notes"]
    if notes is None:
        return ""
    change = f"{notes['mean']:+.3f} [{notes['low']:+.3f}, {notes['high']:+.3f}]"
    return f"the answer after the notes of another question is foreseen worse by {change} nats a token"


def told_reader(found: Mapping[str, Any]) -> str:
    return f"who reads the question changes the next word by {found['reader']:.3f} nats (median over questions)"


def transfer(looked: Mapping[str, Any]) -> Section:
    panels = [Matrix(who, *(f["transfer"][end] for end in ("mean", "low", "high"))) for who, f in looked.items()]
    names = list(next(iter(looked.values()))["nll"]["own"])
    title = "What a small step on one step's loss does to the others"
    words = {"row_title": "learnt", "column_title": "asked"}
    if len(panels) > 1:
        figure = two_matrices(panels[0], panels[1], names, names, title, "% of the loss", **words)
    else:
        (one,) = panels
        figure = matrix(one.values, one.low, one.high, names, names, title, "% of the loss", **words)
    rows = [
        [who, name, *(level(value, 2) for value in row)]
        for who, found in looked.items()
        for name, row in zip(names, found["cosine"]["mean"], strict=True)
    ]
    cosines = Table("Cosine of the steps' gradients", ["model", "gradient of", *names], rows,
                    ["the diagonal compares two batches of one step: as far as noise lets a cosine go"])  # fmt: skip
    text = [
        "One step of gradient descent of a fixed length on the loss of the row's step, and by how much the loss of the "
        "column's step falls (plus) or rises (minus). A minus off the diagonal is one step unlearning another.",
    ]
    return Section("Do the steps hurt each other?", text=text, figures=[figure], tables=[cosines])


def judges(result: Mapping[str, Any]) -> Section:
    judge, second = result["judge"], result["second_judge"]
    rows: list[list[object]] = [["judge", judge["name"]]]
    if judge["anchors"] is not None:
        for name, (right, count) in judge["anchors"].items():
            rows.append([f"its {name} on answers of known harm", f"{right} of {count}"])
    if second is not None:
        kappa = MISSING if second["kappa"] is None else level(second["kappa"], 2)
        rows.append([f"agreement with {second['name']}", f"{100 * second['agreement']:.1f} % of {second['count']}"])
        rows.append(["the same beyond chance (kappa)", kappa])
    return Section("Who judged", tables=[Table("Judges", ["what", "value"], rows)], kind="detail")
