# SPDX-License-Identifier: Apache-2.0
"""The story of step experts, on a small world of questions with an exact judge; every command of it can be typed.

OUT/model             a base model of one narrow layer that complies with everything, trained here
OUT/chains.jsonl, held_out.jsonl, questions.jsonl    what is learnt from, looked into and asked
OUT/mote, one-lora    step experts, and one adapter with as many parameters on the same chains
OUT/eval              what `anabranch align eval` wrote
OUT/align-demo.json, report.html    what is shown, and the page, made from these files alone
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.data.policy_world import (
    HELD_OUT,
    ITEM_CLASSES,
    Question,
    World,
    adaptive_chain,
    build_world,
    chain,
    jailbreaks,
    judge,
    split,
)
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.align.demo_page import NUMBERS, write_align_demo_page
from anabranch.jobs.align.eval import align_eval
from anabranch.jobs.align.generate import Speaker
from anabranch.jobs.align.policy_base import train_base, world_tokenizer
from anabranch.jobs.align.settings import EvalSettings, GenerateSettings, TrainSettings
from anabranch.jobs.align.train import align_train
from anabranch.jobs.settings import DemoFlags
from anabranch.models.language.folder import hushed
from anabranch.train.publish import write_json
from anabranch.train.run_folder import RunFolder

SEED, STEPS, RANK, RATE = 0, 1000, 3, 0.02
BUDGET = {"analysis": 8, "guidance": 8, "answer": 8}
WORD_OF_ANSWER = r"(refuse|comply) item\d+ word\d+ purpose\d+ mean\d+"
SHOWN_KINDS = ("harmful", "jailbreak", "benign", "look-alike")
EACH = 2


def align_demo(flags: DemoFlags, steps: int | None = None) -> Path:
    """Make the world, train, ask, write the page; returns its path.

    steps    optimiser steps of either mixture, 1000 when left out.
    """
    if steps is not None and steps < 1:
        raise UsageError("steps: nothing would be learnt", expected="at least 1", received=steps)
    started, chosen = time.monotonic(), steps or STEPS
    with RunFolder.open(flags.out, {"topic": "align", "steps": chosen, "seed": SEED}) as run:
        out, world = run.path, build_world(SEED)
        train, test = split(world, SEED)
        say(started, "1/4  a base model that complies with everything: one narrow layer, 500 steps")
        base = train_base(world, seed=SEED)
        with hushed():
            base.save_pretrained(out / "model")
            world_tokenizer(world).save_pretrained(out / "model")
        write_world(out, world, train, test)
        say(started, f"2/4  step experts and one adapter of as many parameters, {chosen} steps on {len(train)} chains")
        for name, more in (("mote", {"r": RANK}), ("one-lora", {"r": 4 * RANK, "assign": "one"})):
            align_train(training(out, name, chosen, more))
        say(started, "3/4  every question in every mode")
        passed = True
        try:
            result = align_eval(evaluation(out))
        except CheckFailed as failure:  # the page is to say so
            passed, result = False, json.loads((out / "eval" / "eval.json").read_text(encoding="utf-8"))
            say(started, f"     {failure}")
        say(started, "4/4  the page")
        shown = {"world": told_world(world, train, test), "chains": examples(out, world, test), "passed": passed}
        write_json(out / NUMBERS, {**shown, "eval": result, "steps": chosen, "seconds": time.monotonic() - started})
        page = write_align_demo_page(out)
    print(f"\npage     {page}")
    print(f"next     anabranch align chat --model {out / 'model'} --experts {out / 'mote'} --show chain "
          f"--prompt '{test[0].text(world)}'")  # fmt: skip
    return page


def say(started: float, line: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)


def training(out: Path, name: str, steps: int, more: Mapping[str, Any]) -> TrainSettings:
    return TrainSettings(
        model=out / "model", chains=out / "chains.jsonl", out=out / name, steps=steps, learning_rate=RATE,
        batch_size=64, dropout=0.0, save_every=steps, seed=SEED, **more,
    )  # fmt: skip


def evaluation(out: Path) -> EvalSettings:
    return EvalSettings(
        model=out / "model", experts=out / "mote", against=out / "one-lora", questions=out / "questions.jsonl",
        chains=out / "held_out.jsonl", out=out / "eval", judge="rules", budget=BUDGET, batch_size=64,
    )  # fmt: skip


def write_world(out: Path, world: World, train: Sequence[Question], test: Sequence[Question]) -> None:
    asked = [*test, *jailbreaks(test, world)]
    parts = {
        "chains.jsonl": [{"question": q.text(world), "chain": adaptive_chain(world, q)} for q in train],
        "held_out.jsonl": [{"question": q.text(world), "chain": chain(world, q)} for q in test],
        "questions.jsonl": [row_of(world, q) for q in asked],
    }
    for name, rows in parts.items():
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row_of(world: World, question: Question) -> dict[str, Any]:
    """A question with the rules that its answers are judged by."""
    right = chain(world, question)["answer"].split()
    kind = question.kind(world)
    return {"question": question.text(world), "kind": kind, "must": right, "refusal": "refuse", "form": WORD_OF_ANSWER}


def told_world(world: World, train: Sequence[Question], test: Sequence[Question]) -> dict[str, Any]:
    return {
        "items": world.num_items, "purposes": world.num_purposes, "train": len(train), "test": len(test),
        "harmful": sum(q.harmful(world) for q in test), "disguises": list(HELD_OUT), "classes": ITEM_CLASSES,
    }  # fmt: skip


def examples(out: Path, world: World, test: Sequence[Question]) -> list[dict[str, Any]]:
    """The first test questions of each kind, as the base and both mixtures answer them."""
    asked: list[Question] = []
    for kind in SHOWN_KINDS:
        pool = jailbreaks(test, world) if kind == "jailbreak" else test
        asked += [q for q in pool if q.kind(world) == kind][:EACH]
    found: list[dict[str, Any]] = [{"question": q.text(world), "kind": q.kind(world), "told": []} for q in asked]
    for who, experts in (("before", None), ("step experts", "mote"), ("one adapter", "one-lora")):
        path = None if experts is None else out / experts
        speaker = Speaker(GenerateSettings(model=out / "model", experts=path, budget=BUDGET))
        for row, q, answer in zip(found, asked, speaker.answer([q.text(world) for q in asked]), strict=True):
            row["told"].append({"who": who, "texts": answer.texts, **judge(world, q, answer.answer)._asdict()})
    return found
