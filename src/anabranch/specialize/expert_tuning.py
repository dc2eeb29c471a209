# SPDX-License-Identifier: Apache-2.0
"""The training of chosen experts on tokens, which methods of choosing share.

It runs on the common loop (train/loop.py): the state of the objective, hence a checkpoint, is the chosen slices and
nothing else, and of several processes each has its share of a batch's rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.mixture.losses import over_ranks
from anabranch.models.mixtures.adapter import ExpertAdapter, fused_of, read_experts
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.specialize.chosen_experts import ChosenExperts
from anabranch.train.loop import Stream, TrainConfig, train
from anabranch.train.touch import TouchReport, digest_of, touch_report
from anabranch.train.trackers import Tracker


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: int = 500
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Not of biases."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, received {self.steps}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected more than 0, received {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0, received {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected at least 0 and below 1, received {self.betas}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where the loop keeps a training, and how it is spread out; by default nowhere, in one process or several."""

    folder: Path | None = None
    """For checkpoints and metrics.jsonl."""
    resume: bool = False
    seed: int = 0
    save_every: int = 500
    tracker: Tracker = "none"
    sharding: Literal["none", "full"] = "none"
    report: Callable[[str], None] | None = None
    """Hears lines for people."""


NOT_KEPT = Kept()


@dataclass(frozen=True, eq=False)
class Tuned:
    adapter: ExpertAdapter
    losses: tuple[float, ...]
    """Before each step; of a training that was resumed, before each step since then."""


def by_layer(chosen: Tensor, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """(L, N) bool and the names of the L layers, to the experts of each."""
    if len(chosen) != len(layers):
        raise UsageError("scores and layers do not match", expected=f"{len(layers)} layers", received=len(chosen))
    return {name: tuple(row.nonzero().flatten().tolist()) for name, row in zip(layers, chosen, strict=True)}


# batches


def rows_of(batch: Batch, num_rows: int | None = None) -> dict[str, Tensor]:
    """What the loop takes: every token with whether it is learnt; filled up with rows of which none is.

    Raises:
        UsageError: no token is learnt.
    """
    real_BS = batch.attention_mask.bool()
    learnt_BS = real_BS if batch.answers is None else real_BS & batch.answers.bool()
    learnt_BS = learnt_BS & nn.functional.pad(real_BS, (1, 0))[:, :-1]  # a token before it tells it
    if not bool(learnt_BS.any()):
        raise UsageError("a batch has no token to learn", expected="an answer with a token before it")
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "learnt": learnt_BS}
    missing = 0 if num_rows is None else num_rows - len(batch.input_ids)
    if missing:  # rows that repeat the last one, for a model has to read something
        rows = {name: torch.cat([value, value[-1:].expand(missing, -1)]) for name, value in rows.items()}
        rows["learnt"][-missing:] = False
    return rows


class Given:
    """Stream of the loop: batches that are there, one a step."""

    def __init__(self, batches: Sequence[Batch]):
        if not batches:
            raise UsageError("nothing was trained", expected="at least one batch", received="none")
        num_rows = max(len(batch.input_ids) for batch in batches)
        self.batches = [rows_of(batch, num_rows) for batch in batches]

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.batches[step]


# the training


class NextTokens(nn.Module):
    """Objective of the loop: a batch of `rows_of` -> {"loss": ()}; the parameters are those of the chosen experts.

    The model's mode is left as it is: in evaluation mode neither dropout nor a router's noise of training acts, and
    nothing is drawn.
    """

    def __init__(self, chosen: ChosenExperts):
        super().__init__()
        self.held = (chosen.model,)  # the state of this objective, hence every checkpoint, is what is trained alone
        for name, parameter in chosen.named_parameters().items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def computing(self) -> list[nn.Module]:
        """In whose forward pass the parameters are used: what sharded training shards, frozen weights with it."""
        return list(self.held)

    def _apply(self, fn: Any, recurse: bool = True) -> "NextTokens":
        self.held[0]._apply(fn)  # the parameters here are lodged there
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.held[0](input_ids=ids, attention_mask=mask, use_cache=False).logits
        return {"loss": next_token_loss(logits, ids, batch["learnt"])}


def next_token_loss(logits: Tensor, input_ids: Tensor, learnt: Tensor) -> Tensor:
    """Mean over the learnt tokens of -log p(token | those before it).

    Of several processes each has its sum, divided by its fair share of all of their tokens.
    """
    learnt_BS = learnt[:, 1:]
    exact_BSV = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    sum_ = nn.functional.cross_entropy(exact_BSV[learnt_BS], input_ids[:, 1:][learnt_BS], reduction="sum")
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    ranks = 1 if alone else torch.distributed.get_world_size()
    return sum_ * ranks / over_ranks(learnt_BS.sum().to(sum_.dtype), "global").clamp(min=1)


def tune(
    model: Any, experts: Mapping[str, Sequence[int]], batches: Iterable[Batch] | Stream, config: Training, *,
    shared: bool = False, facts: Mapping[str, Any] | None = None, kept: Kept = NOT_KEPT,
) -> Tuned:  # fmt: skip
    """Trains the experts in place on at most `config.steps` batches.

    batches    taken one after another, or a stream of `rows_of` by step; a run that goes on needs the same ones

    Raises:
        AnabranchError: a loss is not finite; the experts are as they were before that step.
    """
    if hasattr(batches, "batch"):
        stream, steps = batches, config.steps
    else:
        taken = list(islice(batches, config.steps))
        stream, steps = Given(taken), len(taken)
    base = fingerprint(model)
    plan = loop_config(config, kept, steps, len(stream.batch(0)["learnt"]))
    with ChosenExperts(model, experts, shared=shared, lodged=True) as chosen:
        result = train(NextTokens(chosen), stream, plan, kept.folder, resume=kept.resume, report=kept.report)
    return Tuned(read_experts(model, chosen.experts, base, whole=chosen.whole, facts=facts), tuple(result.losses))


def loop_config(config: Training, kept: Kept, steps: int, batch_size: int) -> TrainConfig:
    """A constant rate, as the papers have it."""
    return TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=config.learning_rate,
        min_learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas,
        max_grad_norm=config.max_grad_norm, seed=kept.seed, save_every=kept.save_every, tracker=kept.tracker,
        sharding=kept.sharding,
    )  # fmt: skip


# what was touched


def digest_by_slice(model: nn.Module) -> dict[str, str]:
    """sha-256 of every tensor of the model; of stacked experts of each slice, TENSOR.EXPERT."""
    stacked = {name for layer in mixture_layers(model) for name in fused_of(layer)}
    found = {}
    for name, value in model.state_dict().items():
        parts = {f"{name}.{e}": own for e, own in enumerate(value)} if name in stacked else {name: value}
        found |= {key: digest_of(part) for key, part in parts.items()}
    return found


def touched(before: Mapping[str, str], after: Mapping[str, str], experts: Mapping[str, Sequence[int]]) -> TouchReport:
    """
    before, after    of `digest_by_slice`

    Raises:
        CheckFailed: an expert that was to learn is as it was, or anything else is not.
    """
    named = [f"{layer}.experts.*.{expert}" for layer, own in experts.items() for expert in own]
    return touch_report(before, after, named)
