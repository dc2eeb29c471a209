# SPDX-License-Identifier: Apache-2.0
"""The page of the experiment with sub-nets: the transfer matrix, what they change, how much sharing is best, safety."""

import json
from pathlib import Path
from typing import Any

from anabranch.jobs.transfer.demo_page import arm_table, compared, effect_section
from anabranch.jobs.transfer.measure_page import transfer_facts, transfer_lead, transfer_sections
from anabranch.jobs.transfer.sdr_compare import DIAL, collapse_rows, harmed
from anabranch.report.figures import curves
from anabranch.report.page import Figure, Page, Section, Table, write

LEAD = {
    ("sdr", "sdr wrong"): "The sub-net that a task picks, minus those that other tasks pick",
    ("sdr", "sdr-random"): "Sub-nets of clusters that were found without labels, minus sub-nets of random images",
    ("sdr", "continued"): "Sub-nets of clusters, minus the shared model trained on equally long",
}


def write_subnet_page(run: Path) -> Path:
    """report.html of a run of the recipe for SDR, from its files."""
    transfer = json.loads((run / "transfer.json").read_text(encoding="utf-8"))
    result = json.loads((run / "sdr.json").read_text(encoding="utf-8"))
    verdict, matrix, *rest = transfer_sections(transfer)
    page = Page(
        title="Where sharing hurts, and what sub-nets do about it",
        lead=[*transfer_lead(transfer), *compared(result, LEAD)],
        facts=[*transfer_facts(transfer)[:-1], *subnet_facts(transfer, result)],
        sections=[verdict, matrix, effect_section(result), dial_section(result), safety(result), arm_table(result),
                  collapse(result), *rest],
    )  # fmt: skip
    return write(page, run / "report.html")


def subnet_facts(transfer: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("sub-nets", f"{result['clusters']}: {result['groups']} groups in each of {result['split_stages']} stages"),
        ("stage with sub-nets", f"{result['steps']:,} steps of {result['batch_size']} images, the same for every arm"),
        ("processor time", f"{(transfer['seconds'] + result['seconds']) / 60:.0f} minutes"),
    ]


def dial_section(result: dict[str, Any]) -> Section:
    text = [
        "From one model for all, through sub-nets that share three quarters, half and a quarter of the channels of the "
        "stages that are split, to one model a cluster. Both ends were trained like the middle, from the same start."
    ]
    return Section("How much should be shared", text=text, figures=[dial(result)])


def dial(result: dict[str, Any]) -> Figure:
    """Accuracy over the share of channels that a sub-net has for itself."""
    known = {name: own for name, own in DIAL.items() if name in result["levels"]}
    levels = [result["levels"][name] for name in known]
    series = {"mean over tasks": [level["mean"] for level in levels]}
    series |= {task: [level["tasks"][task] for level in levels] for task in result["tasks"]}
    drawn = {
        name: (list(known.values()), *([point[end] for point in points] for end in ("mean", "low", "high")))
        for name, points in series.items()
    }
    return curves(
        drawn, "own channels in a split stage (%)", "accuracy (%)", "From everything shared to nothing shared"
    )


def safety(result: dict[str, Any]) -> Section:
    return Section("Is any task worse off", text=[harmed(result)])


def collapse(result: dict[str, Any]) -> Section:
    columns = ["arm", "spread of embeddings", "directions, mean", "least", "collapsed"]
    notes = ["Directions hold 95 % of the variance of the features; fewer than half of the base's are a collapse."]
    return Section("Has anything collapsed", tables=[Table("Collapse", columns, collapse_rows(result), notes)])
