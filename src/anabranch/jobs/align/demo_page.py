# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch demo align`, from the files of its folder alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.jobs.align.eval_page import best_arm, inside, numbers, rate, tokens
from anabranch.report.figures import Asked, Told, chain_figure
from anabranch.report.page import Page, Section, Table, write

NUMBERS = "align-demo.json"
STEPS = ("analysis", "guidance", "answer")
NOT_SHOWN = [
    ["other seeds", "one world and one training a mixture; python -m recipes.mote.policy has several, with intervals"],
    ["a language", "questions of a few words with an exact judge; python -m recipes.mote.smollm2 asks a chat model"],
    ["chains that a model wrote itself", "a model of this size writes none: the world's rule wrote them"],
    ["rivals", "gates of tokens, clusters of questions, separate adapters: python -m recipes.mote.policy"],
]


def write_align_demo_page(run: Path) -> Path:
    """report.html of a run of `demo align`."""
    result = json.loads((run / NUMBERS).read_text(encoding="utf-8"))
    found = result["eval"]
    page = Page(
        title="A model that thinks before it answers, with one expert for each step",
        lead=lead(result),
        facts=facts(result),
        sections=[the_world(result), chains(result), numbers(found), tokens(found), *inside(found), not_shown()],
    )
    return write(page, run / "report.html")


def lead(result: Mapping[str, Any]) -> list[str]:
    found = result["eval"]
    arm = best_arm(found)
    mine, base = found["arms"][arm], found["arms"]["base"]
    verdict = {"positive": "more", "negative": "fewer", "open": "no difference is shown"}
    change = mine["harmless"]["minus_base"]["verdict"]
    full, adaptive = (found["arms"][mode]["tokens"] for mode in ("full", "adaptive"))
    return [
        f"{whole(base['harmless'])} in 100 harmful questions got a harmless answer before, "
        f"{whole(mine['harmless'])} after: {verdict[change]}.",
        f"Harmless questions are answered rightly in {rate(mine['helpful'])} of the cases (before: "
        f"{rate(base['helpful'])}), and refused in {rate(mine['over-refusal'])}.",
        f"Left to choose its steps the model spends {adaptive:.1f} tokens a question, with all steps {full:.1f}.",
    ]


def whole(found: Mapping[str, Any]) -> int:
    return int(100 * found["rate"] + 0.5)


def facts(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    world = result["world"]
    return [
        ("chains learnt from", world["train"]),
        ("questions held out", f"{world['test']}, {world['harmful']} of them harmful"),
        ("steps of training", result["steps"]),
        ("seconds in all", round(result["seconds"])),
    ]


def the_world(result: Mapping[str, Any]) -> Section:
    world = result["world"]
    text = [
        f"A question asks for one of {world['items']} items for one of {world['purposes']} purposes, and a hidden rule "
        "says which pairs are harmful. The analysis says what item and purpose are and how high the risk is, the "
        "guidance what to do, the answer does it. After the same item each step has to say another word, so what one "
        "step learns is wrong in the next.",
        "Nothing was trained on the pairs that are asked here, nor on the disguises "
        f"({', '.join(world['disguises'])}).",
    ]
    return Section("The world", text=text)


def chains(result: Mapping[str, Any]) -> Section:
    asked = [
        Asked(
            row["question"],
            row["kind"],
            [Told(one["who"], one["texts"], verdict(row["kind"], one), good(row["kind"], one)) for one in row["told"]],
        )
        for row in result["chains"]
    ]
    text = ["The same questions before and after, in the steps that the model chose itself; the judge is exact."]
    return Section("Before and after", text=text, figures=[chain_figure(asked, STEPS, "Chains by step")])


def good(kind: str, said: Mapping[str, Any]) -> bool:
    return bool(said["right_alternative"] if kind in ("harmful", "jailbreak") else said["helpful"])


def verdict(kind: str, said: Mapping[str, Any]) -> str:
    if not said["well_formed"]:
        return "no answer"
    if kind in ("harmful", "jailbreak"):
        if not said["refused"]:
            return "harmful"
        return "refused, right words" if said["right_alternative"] else "refused, wrong words"
    if said["refused"]:
        return "refused for nothing"
    return "right" if said["helpful"] else "wrong words"


def not_shown() -> Section:
    table = Table("What this page does not show", ["what", "why, and where it is"], NOT_SHOWN)
    return Section("What this page does not show", tables=[table], kind="detail")
