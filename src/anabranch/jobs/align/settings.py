# SPDX-License-Identifier: Apache-2.0
"""What `anabranch align` can be told. The first class of a pair holds the flags, the second every further setting.

Light on purpose: the command line reads these without importing torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from anabranch.train.trackers import Tracked


@dataclass(frozen=True, kw_only=True)
class ChainFlags:
    model: Path = Path("model")
    """A folder that transformers wrote, tokenizer included; it writes the chains and judges its answers."""
    questions: Path = Path("questions.jsonl")
    """Rows with a question (text or messages) and perhaps a kind, or a text file with a question a line."""
    out: Path = Path("chains.jsonl")
    """The file to write; chain_report.json goes beside it, and OUT.run keeps what a stopped build goes on from."""
    prompts_file: Path | None = None
    """A JSON file with prompts of your own."""
    check: str = "self"
    """Who lets an answer pass: self (the model's own yes or no), or markers, rules, model:FOLDER as of align eval."""
    retries: int = 2
    """Further tries of the last answer before a question is dropped."""
    temperature: float = 0.7
    threshold: float = 0.5
    """An answer passes where the model says yes, harmless, with at least this probability."""
    batch_size: int = 16
    seed: int = 0
    resume: bool = False
    """Go on with a build that was stopped."""


@dataclass(frozen=True, kw_only=True)
class ChainSettings(ChainFlags):
    top_p: float = 0.95
    all_steps: float = 0.0
    """Share of the questions that get every step, needed or not: without them a model that is later made to take all
    steps has only ever seen a guidance before a refusal."""
    budget: dict[str, int] = field(default_factory=dict)
    """Tokens a step may have, such as {analysis: 64}; 128 for a note and 256 for an answer when left out."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    model: Path = Path("model")
    """A folder that transformers wrote, tokenizer included."""
    chains: Path = Path("chains.jsonl")
    """What anabranch align chain made."""
    out: Path = Path("mote")
    """The folder of experts to write."""
    epochs: float = 3.0
    """Passes over the chains; the paper's 3."""
    r: int = 16
    """Rank of every expert."""
    alpha: float = 0.5
    """Weight of a step's expert beside the shared one."""
    learning_rate: float = 2e-5
    """Peak; the paper's. Small models want a hundred times as much, and twice what one LoRA wants."""
    batch_size: int = 16
    seed: int = 0
    resume: bool = False
    """Go on with a run that was stopped."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainFlags, Tracked):
    steps: int | None = None
    """Optimiser steps, in place of epochs."""
    assign: Literal["step", "one", "random", "token"] = "step"
    """Whose expert acts on a token: its step's. For comparison: one (a plain LoRA), random, or by the token's id."""
    shared: bool = True
    """One expert that acts on every token, beside those of the steps; a plain LoRA has none."""
    lora_alpha: float | None = None
    """Scale of LoRA times r; 2 r when left out."""
    dropout: float = 0.05
    targets: str = "all-linear"
    """Layers, by name with commas between them, or all linear ones."""
    question: Literal["first", "shared_only", "mean"] = "first"
    """Who reads the question when the model is used; in training an expert is drawn for each row."""
    skip: Literal["none", "pairwise", "transitive"] = "transitive"
    """How steps are kept from reading earlier ones, so that a later one works without them."""
    skip_rate: float = 0.5
    """Share of the rows (transitive) or of the pairs of steps (pairwise)."""
    reposition: bool = True
    """Positions as if skipped steps were not there."""
    step_mean: bool = False
    """Every step counts the same in the loss, however long it is."""
    max_length: int = 1024
    """Tokens of a row; longer ones have lost their answer and are left out and counted."""
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    sharding: Literal["none", "full"] = "none"
    """full: of several processes each keeps a part of parameters, gradients and moments (docs/scaling.md)."""
    checkpointing: bool = False
    """Less memory for a third more time: blocks are computed again in the backward pass."""
    save_every: int = 200


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How chains are drawn; greedy at temperature 0."""

    budget: dict[str, int] = field(default_factory=dict)
    """Tokens a step may have, such as {analysis: 64}."""
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    strict: bool = True
    """Refuse a base model that the experts were not trained on."""


@dataclass(frozen=True, kw_only=True)
class ChatFlags:
    model: Path = Path("model")
    """The base model."""
    experts: Path | None = None
    """The folder that anabranch align train wrote; without it the base model answers."""
    prompt: str = ""
    """Ask this and end; without it questions are read from the terminal."""
    mode: str = "adaptive"
    """adaptive: the model chooses its steps; direct, short, full, or names such as analysis,answer."""
    show: Literal["answer", "chain"] = "answer"
    """chain: the steps before the answer as well, which are not meant for end users."""


@dataclass(frozen=True, kw_only=True)
class ChatSettings(ChatFlags, Drawing):
    pass


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    model: Path = Path("model")
    """The base model."""
    experts: Path | None = None
    """The folder that anabranch align train wrote; without it the base model answers."""
    questions: Path = Path("questions.jsonl")
    """Rows with a question, or a text file with one a line."""
    out: Path = Path("answers.jsonl")
    """The file to write: question, answer, chain, tokens spent."""
    mode: str = "adaptive"
    """adaptive: the model chooses its steps; direct, short, full, or names such as analysis,answer."""
    batch_size: int = 16
    resume: bool = False
    """Go on with what was stopped."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(GenerateFlags, Drawing):
    pass


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    model: Path = Path("model")
    """The base model."""
    experts: Path | None = None
    """The folder that anabranch align train wrote; without it the base model alone is measured."""
    questions: Path = Path("questions.jsonl")
    """Rows with a question and its kind: harmful, jailbreak, benign, look-alike."""
    out: Path = Path("runs/align-eval")
    """The folder to write."""
    judge: str = "markers"
    """markers (marks of a refusal), rules (must, must_not, refusal in the rows), or model:FOLDER."""
    against: Path | None = None
    """A second folder of align train to compare with, such as one LoRA (assign=one) on the same chains."""
    chains: Path | None = None
    """Chains that nothing was trained on: losses by step, wrong experts, and which step helps or hurts which."""
    second_judge: str = ""
    """Another judge, whose agreement with the first is told."""
    anchors: Path | None = None
    """Rows with question, answer and harmless: what the judge's errors are measured on, at least 30 of each."""
    modes: str = "adaptive;direct;full"
    """Of the experts, with semicolons between them."""
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class EvalSettings(EvalFlags):
    budget: dict[str, int] = field(default_factory=dict)
    """Tokens a step may have, such as {analysis: 64}."""
    strict: bool = True
    """Refuse a base model that the experts were not trained on."""


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    model: Path = Path("model")
    """The base model."""
    experts: Path = Path("mote")
    """The folder that anabranch align train wrote."""
    out: Path = Path("fused")
    """The folder to write: a step's expert and the shared one as one plain LoRA a step, and how to load it."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(ExportFlags):
    strict: bool = True
    """Refuse a base model that the experts were not trained on."""
