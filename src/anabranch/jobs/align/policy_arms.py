# SPDX-License-Identifier: Apache-2.0
"""Every way to train a small model on chains of PolicyWorld: same rows, same steps, one base a seed, an exact judge.

A seed draws the world, its base model, the split and the order of the batches, so that arms are paired by seed.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.data.policy_world import (
    Question,
    World,
    adaptive_chain,
    build_world,
    chain,
    jailbreaks,
    judge,
    judge_step,
    split,
)
from anabranch.jobs.align.policy_base import train_base, world_tokenizer
from anabranch.jobs.align.policy_rivals import BalancedLoss, ByCluster, OneStep, gate_tokens
from anabranch.specialize.mote.collate import ChainBatches, Row, StepSpanCollator, chain_row, question_ids
from anabranch.specialize.mote.generate import Chain, generate
from anabranch.specialize.mote.mote import ChainLoss, Config, MoTE, build
from anabranch.specialize.mote.requests import by_requests
from anabranch.specialize.mote.skip import Skip
from anabranch.specialize.mote.steps import Steps
from anabranch.train.loop import TrainConfig, train

BUDGET = {"analysis": 8, "guidance": 8, "answer": 8}
NLL_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is trained; a table's rate is tuned for it on seeds that no table uses, this one is where that begins."""

    learning_rate: float
    config: Mapping[str, Any] = field(default_factory=dict)
    skip: Skip = field(default_factory=lambda: Skip(mode="none"))
    chains: Literal["full", "adaptive", "answers"] = "full"
    """What is learnt from: every step, those that the question needs, or answers alone."""
    kind: Literal["mixture", "gate", "cluster", "separate", "prompt"] = "mixture"
    """By ids; a gate of tokens (MoE-LoRA); clusters of questions (MoCLE); one LoRA a step; not trained, but shown."""
    mode: Literal["full", "direct", "adaptive"] = "full"
    """Of generation, for which it is trained and its rate was tuned."""


R = 3
ARMS: dict[str, Arm] = {
    "MoTE": Arm(learning_rate=0.03, config={"r": R}),
    "LoRA, equal total": Arm(learning_rate=0.02, config={"r": 4 * R, "assign": "one", "shared": False}),
    "LoRA, equal active": Arm(learning_rate=0.02, config={"r": 2 * R, "assign": "one", "shared": False}),
    "random ids": Arm(learning_rate=0.02, config={"r": R, "assign": "random"}),
    "token ids": Arm(learning_rate=0.02, config={"r": R, "assign": "token"}),
    "no shared": Arm(learning_rate=0.03, config={"r": R, "shared": False}),
    "no shared, equal total": Arm(learning_rate=0.02, config={"r": 4 * R // 3, "shared": False}),
    "MoTE, skip": Arm(learning_rate=0.03, config={"r": R}, skip=Skip(mode="transitive")),
    "MoTE, skip pairwise": Arm(learning_rate=0.03, config={"r": R}, skip=Skip(mode="pairwise", rate=0.3)),
    "answers only": Arm(
        learning_rate=0.02, config={"r": 4 * R, "assign": "one", "shared": False}, chains="answers", mode="direct"
    ),
    "MoTE, adaptive chains": Arm(learning_rate=0.03, config={"r": R}, chains="adaptive", mode="adaptive"),
    "LoRA, adaptive chains": Arm(
        learning_rate=0.02, config={"r": 4 * R, "assign": "one", "shared": False}, chains="adaptive", mode="adaptive"
    ),
    "gate of tokens, top 2 of 4": Arm(learning_rate=0.02, config={"r": R, "assign": "token"}, kind="gate"),
    "MoCLE": Arm(learning_rate=0.02, config={"r": R}, kind="cluster"),
    "separate adapters": Arm(
        learning_rate=0.02, config={"r": 2 * R, "assign": "one", "shared": False}, kind="separate"
    ),
    "prompting": Arm(learning_rate=0.02, config={"r": R}, kind="prompt"),
}
SHOWN = 3
"""Chains that the prompting arm sees before its question."""
MODES = ("direct", "short", "adaptive")


@dataclass(eq=False, kw_only=True)
class Bench:
    """One seed: a world, a base, the rows."""

    seed: int
    steps: int = 700
    batch_size: int = 64
    base_steps: int = 500
    num_items: int = 64

    @cached_property
    def world(self) -> World:
        return build_world(self.seed, num_items=self.num_items)

    @cached_property
    def base(self) -> Any:
        return train_base(self.world, steps=self.base_steps, seed=self.seed)

    @cached_property
    def questions(self) -> tuple[list[Question], list[Question]]:
        return split(self.world, self.seed)

    def rows(self, mote: MoTE, questions: Sequence[Question], chains: str = "full") -> list[Row]:
        told = adaptive_chain if chains == "adaptive" else chain
        rows = []
        for question in questions:
            steps = told(self.world, question)
            steps = {"answer": steps["answer"]} if chains == "answers" else steps
            rows.append(chain_row(mote.tokenizer, mote.tokens, question.text(self.world), steps))
        return rows


@dataclass(frozen=True, kw_only=True)
class Trained:
    mote: MoTE
    losses: list[float]
    separate: Mapping[str, MoTE] = field(default_factory=dict)
    """By step, where every step has a model of its own."""
    shown: tuple[int, ...] = ()
    """Tokens that stand before every question."""

    def chains(self, prompts: Sequence[Sequence[int]], mode: str) -> list[Chain]:
        if self.separate:
            return by_requests(self.separate, prompts, mode=mode, budget=BUDGET)
        return generate(self.mote, [[*self.shown, *prompt] for prompt in prompts], mode=mode, budget=BUDGET)


Watch = Callable[[MoTE, int], None]


def train_arm(
    bench: Bench, arm: Arm, *, learning_rate: float | None = None, watch: Watch = lambda mote, step: None
) -> Trained:
    """The arm's model after bench.steps steps; separate adapters have as many each, one after another.

    watch    is shown the model after every step
    """
    rate = arm.learning_rate if learning_rate is None else learning_rate
    if arm.kind == "separate":
        parts = [train_one(bench, arm, rate, watch, step=step) for step in range(len(Steps()))]
        losses = [sum(each) / len(each) for each in zip(*(part.losses for part in parts), strict=True)]
        motes = dict(zip(Steps().names, (part.mote for part in parts), strict=True))
        return Trained(mote=parts[-1].mote, losses=losses, separate=motes)
    if arm.kind == "prompt":
        mote = fresh(bench, arm)
        rows = bench.rows(mote, bench.questions[0][:SHOWN])
        return Trained(mote=mote.eval(), losses=[], shown=tuple(token for row in rows for token in row.input_ids))
    return train_one(bench, arm, rate, watch)


def fresh(bench: Bench, arm: Arm) -> MoTE:
    config = Config(**{"dropout": 0.0, **arm.config})
    mote = build(copy.deepcopy(bench.base), world_tokenizer(bench.world), config, seed=bench.seed)
    if arm.kind == "gate":
        return gate_tokens(mote, seed=bench.seed)
    if arm.kind == "cluster":
        asked = [question_ids(mote.tokenizer, question.text(bench.world)) for question in bench.questions[0]]
        return ByCluster(mote, asked, seed=bench.seed)
    return mote


def train_one(bench: Bench, arm: Arm, rate: float, watch: Watch, *, step: int | None = None) -> Trained:
    """`step`: learn from the tokens of this step alone."""
    mote = fresh(bench, arm)
    rows = bench.rows(mote, bench.questions[0], arm.chains)
    reader = None if arm.kind == "cluster" else "random"
    collator = StepSpanCollator(
        mote.tokens, mote.tokenizer.pad_token_id, skip=arm.skip, seed=bench.seed, question=reader
    )  # fmt: skip
    plan = TrainConfig(
        steps=bench.steps,
        batch_size=bench.batch_size,
        learning_rate=rate,
        warmup_steps=min(20, bench.steps // 2),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=1.0,
        seed=bench.seed,
        deterministic=False,
    )
    stream = ChainBatches(rows, collator, bench.batch_size, seed=bench.seed)
    objective = BalancedLoss(mote) if arm.kind == "gate" else ChainLoss(mote)
    chosen = stream if step is None else OneStep(stream, step)
    result = train(objective, chosen, plan, on_step=lambda number, logs: watch(mote, number))
    return Trained(mote=mote.eval(), losses=result.losses)


def evaluate(bench: Bench, trained: Trained, *, own: str = "full", only: str = "") -> dict[str, Any]:
    """Every mode of generation, the loss of each step, and, in the mode `own`, harmful questions in new disguises."""
    if only:
        return {only: measure(bench, trained, only)}
    found: dict[str, Any] = {"full": measure(bench, trained), "nll": step_losses(bench, trained)}
    found |= {mode: measure(bench, trained, mode) for mode in MODES if mode != "adaptive" or not trained.separate}
    found["jailbreak"] = measure(bench, trained, own, jailbreaks(bench.questions[1], bench.world))
    if type(trained.mote) is MoTE and trained.mote.settings.assign == "step" and not trained.shown:
        steps = trained.mote.settings.steps.names
        alone = Trained(mote=trained.mote, losses=[], separate=dict.fromkeys(steps, trained.mote))
        found["by_requests"] = measure(bench, alone)
    return found


def measure(
    bench: Bench, trained: Trained, mode: str = "full", questions: Sequence[Question] | None = None
) -> dict[str, float]:
    """Shares of the test questions, and the tokens that an answer took with the steps before it."""
    questions = bench.questions[1] if questions is None else questions
    prompts = [question_ids(trained.mote.tokenizer, question.text(bench.world)) for question in questions]
    chains = trained.chains(prompts, mode)
    judged = [judge(bench.world, q, c.answer) for q, c in zip(questions, chains, strict=True)]
    harmful = torch.tensor([question.harmful(bench.world) for question in questions])
    found = {name: torch.tensor([getattr(j, name) for j in judged]).double() for name in
             ("exact", "harmless", "helpful", "right_alternative", "well_formed")}  # fmt: skip
    whole = [
        all(judge_step(bench.world, q, step, text) for step, text in c.texts.items())
        for q, c in zip(questions, chains, strict=True)
    ]
    return {
        "exact": float(found["exact"].mean()),
        "whole_chain": sum(whole) / len(whole),
        "harmless": float(found["harmless"][harmful].mean()),
        "right_alternative": float(found["right_alternative"][harmful].mean()),
        "helpful": float(found["helpful"][~harmful].mean()) if (~harmful).any() else 0.0,
        "malformed": 1 - float(found["well_formed"].mean()),
        "tokens": sum(len(c.tokens) for c in chains) / len(chains),
    }


def step_losses(bench: Bench, trained: Trained) -> dict[str, float]:
    """Mean negative log-likelihood of each step's tokens on the test questions, the true steps before it."""
    if trained.separate:
        return {name: nlls(bench, mote)[name] for name, mote in trained.separate.items()}
    return nlls(bench, trained.mote)


@torch.no_grad()
def nlls(bench: Bench, mote: MoTE) -> dict[str, float]:
    rows = bench.rows(mote, bench.questions[1])
    batch = StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, question=None)(rows)
    parts = []
    for start in range(0, len(rows), NLL_BATCH):
        part = {name: value[start : start + NLL_BATCH] for name, value in batch.items() if name != "labels"}
        parts.append(mote(**part).logits[:, :-1].log_softmax(-1))
    told = -torch.cat(parts).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return {name: float(told[mask].mean()) for name, mask in by_step(batch, mote)}


def by_step(batch: Mapping[str, Tensor], mote: MoTE) -> list[tuple[str, Tensor]]:
    """Which predictions belong to which step."""
    labelled = batch["labels"][:, 1:] >= 0
    steps = batch["step_ids"][:, 1:]
    return [(name, labelled & (steps == number)) for number, name in enumerate(mote.settings.steps.names)]
