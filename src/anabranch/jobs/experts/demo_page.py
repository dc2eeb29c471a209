# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch demo experts`, from the files of its folder alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.measure.concept_ratio import ratio
from anabranch.report.figures import Effect, RateRow, flow, forest, loads, matrix, rate_bars
from anabranch.report.page import Page, Section, Table, write
from anabranch.report.text import estimate

NUMBERS = "experts-demo.json"
NOT_SHOWN = [
    ["other models", "one seed of one small model; python -m recipes.experts.compare has two seeds and intervals"],
    ["every method", "tuning, merging, skipping, self-contrast: the comparison of the same recipe"],
    ["speed", "a switched-off expert is computed all the same here; a pruned checkpoint is smaller and faster"],
]


def write_experts_demo_page(run: Path) -> Path:
    """report.html of a run of `demo experts`."""
    told = json.loads((run / NUMBERS).read_text(encoding="utf-8"))
    page = Page(
        title="What the experts of a mixture know",
        lead=lead(told),
        facts=[
            ("weights", f"{told['weights']:,}"),
            ("layers of experts", f"{told['layers']} of {told['experts']}, {told['top_k']} a byte"),
            ("texts", ", ".join(told["labels"])),
            ("seconds in all", round(told["seconds"])),
        ],
        sections=[who_reads_what(told), off(told), rankings(told), seals(told), pruned(told), not_shown()],
    )
    return write(page, run / "report.html")


def lead(told: Mapping[str, Any]) -> list[str]:
    layer, expert, domain, change = strongest(told)
    losses, target = told["pruned"]["losses"], told["target"]
    own, control = losses
    kept, drawn = (f"{losses[arm][target]['change']:+.3f}" for arm in (own, control))
    return [
        f"Expert {layer}.{expert} matters most to one text: without it {domain} costs {change / 1000:.3f} nats a byte "
        "more.",
        f"Half of the experts, kept for {target}: {kept} nats a byte there; half of them at random: {drawn}.",
    ]


def strongest(told: Mapping[str, Any]) -> tuple[int, int, str, float]:
    """The expert whose absence costs one domain the most."""
    every = [
        (row["layer"], row["expert"], name, found["mean"])
        for row in told["off"]
        for name, found in row["change"].items()
    ]
    return max(every, key=lambda one: one[3])


def who_reads_what(told: Mapping[str, Any]) -> Section:
    load = np.array(told["load"])
    most = int(np.argmax([np.abs(layer - layer.mean(1, keepdims=True)).sum() for layer in load]))
    names = [f"expert {most}.{e}" for e in range(told["experts"])]
    text = [
        "Every byte is sent to two of eight experts in each of four layers. Nobody told the experts of the texts; the "
        "balance loss that keeps all of them busy was weak.",
        f"The flow is that of layer {most}, whose experts tell the texts apart best.",
    ]
    figures = [
        flow(100 * load[most].T, told["labels"], names, f"From text to expert, layer {most}"),
        loads(dict(enumerate(load)), told["labels"], "Which expert takes which text"),
    ]
    return Section("Who reads what", text=text, figures=figures)


def off(told: Mapping[str, Any]) -> Section:
    rows = told["off"]
    ends = {
        end: [[row["change"][name][end] for name in told["labels"]] for row in rows] for end in ("mean", "low", "high")
    }
    names = [f"{row['layer']}.{row['expert']}" for row in rows]
    figure = matrix(
        ends["mean"], ends["low"], ends["high"], names, told["labels"], "What each expert is worth to each text",
        "thousandths of a nat a byte", row_title="expert", column_title="loss without it, of",
    )  # fmt: skip
    text = [
        "One expert is switched off and the next in the router's order takes its bytes. What every text loses is the "
        "expert's worth to it; below zero it is better off."
    ]
    return Section("What happens without each expert", text=text, figures=[figure])


def rankings(told: Mapping[str, Any]) -> Section:
    target, rows = told["target"], told["rankings"]["rows"]
    names = list(rows)
    others = [label for label in told["labels"] if label != target]
    table = Table(
        f"The highest experts for {target}, and the losses with them off",
        ["ranking", "experts", f"{target} [95 %]", "mean of the others"],
        [
            [
                name, " ".join(f"{layer}.{expert}" for layer, expert in row["top"]),
                estimate(*(row["change"][target][end] for end in ("mean", "low", "high"))),
                f"{np.mean([row['change'][label]['mean'] for label in others]):+.0f}",
            ]
            for name, row in rows.items()
        ],
        notes=["Thousandths of a nat a byte. Random: mean and interval of eight draws; experts of the first."],
    )  # fmt: skip
    figure = matrix(
        100 * np.array(told["rankings"]["overlap"]), None, None, names, names, "Experts that two rankings share",
        "% of those in either", center=50.0,
    )  # fmt: skip
    text = [
        f"Which experts belong to {target}? Some rankings look at {target} alone (frequency, gate_mass, esft, easy_ep, "
        "reap, seuf, tcess), others set it against the other texts (ftri, steermoe, rice). With the highest off, "
        f"a ranking that finds what is particular costs {target} much and the others little; read it beside random."
    ]
    return Section("Rankings, and how far they agree", text=text, tables=[table], figures=[figure])


def seals(told: Mapping[str, Any]) -> Section:
    rows = []
    for row in told["seals"]:
        found = ratio(np.arange(row["asked"]) < row["right"])
        rows.append(RateRow(f"{row['arm']}: {row['domain']}", 100 * found.rate, 100 * found.low, 100 * found.high))
    table = Table(
        "Letters of the seals", ["arm", "text", "right", "the other text's", "asked"],
        [[row["arm"], row["domain"], row["right"], row["other"], row["asked"]] for row in told["seals"]],
    )  # fmt: skip
    text = [
        "Two of the texts were made to contradict each other: the same names have other letters in law than in "
        "scripture. The model has to tell by the text around the sentence which of them is asked for."
    ]
    return Section(
        "A planted contradiction", text=text, figures=[rate_bars(rows, "Letters that are right")], tables=[table]
    )


def pruned(told: Mapping[str, Any]) -> Section:
    found = told["pruned"]
    effects = [
        Effect(f"{arm}: {label}", one["change"], one["low"], one["high"], None, verdict(one))
        for arm, row in found["losses"].items()
        for label, one in row.items()
    ]
    text = [
        f"Four of eight experts of every layer stay, chosen by {found['by']} for {told['target']}: "
        f"{found['weights']:,} weights of {told['weights']:,}. The random arm is the mean of three such prunings. "
        "The checkpoint is a stock one: transformers opens it alone."
    ]
    figure = forest(effects, "What pruning costs every text", "nats a byte")
    return Section("Half of the experts, for one text", text=text, figures=[figure])


def verdict(one: Mapping[str, float]) -> str:
    return "hurts" if one["low"] > 0 else "helps" if one["high"] < 0 else "open"


def not_shown() -> Section:
    table = Table("What this page does not show", ["what", "why, and where it is"], NOT_SHOWN)
    return Section("What this page does not show", tables=[table], kind="detail")
