# SPDX-License-Identifier: Apache-2.0
"""The training of chosen experts on tokens, which methods of choosing share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.adapter import ExpertAdapter, read_experts
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.specialize.chosen_experts import ChosenExperts


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


@dataclass(frozen=True, eq=False)
class Tuned:
    adapter: ExpertAdapter
    losses: tuple[float, ...]
    """Before each step."""


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over the batch's answer tokens, all real ones if not given, of -log p(token | those before it)."""
    real_BS = batch.attention_mask.bool()
    asked_BS = real_BS if batch.answers is None else real_BS & batch.answers.bool()
    learnt_BS = asked_BS[:, 1:] & real_BS[:, :-1]
    if not bool(learnt_BS.any()):
        raise UsageError("a batch has no token to learn", expected="an answer with a token before it")
    exact_BSV = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(exact_BSV[learnt_BS], batch.input_ids[:, 1:][learnt_BS])


def by_layer(chosen: Tensor, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """(L, N) bool and the names of the L layers, to the experts of each."""
    if len(chosen) != len(layers):
        raise UsageError("scores and layers do not match", expected=f"{len(layers)} layers", received=len(chosen))
    return {name: tuple(row.nonzero().flatten().tolist()) for name, row in zip(layers, chosen, strict=True)}


def tune(
    model: Any, experts: Mapping[str, Sequence[int]], batches: Iterable[Batch], config: Training, *,
    shared: bool = False, facts: Mapping[str, Any] | None = None,
) -> Tuned:  # fmt: skip
    """Trains the experts in place on at most `config.steps` batches.

    The model's mode is left as it is: in evaluation mode neither dropout nor a router's noise of training acts, and
    nothing is drawn.
    """
    chosen = ChosenExperts(model, experts, shared=shared)
    base = fingerprint(model)
    losses: list[float] = []
    with chosen:
        optimizer = build_optimizer(chosen, config)
        for batch in islice(batches, config.steps):
            own = batch.to(next(model.parameters()).device)
            out = model(input_ids=own.input_ids, attention_mask=own.attention_mask, use_cache=False)
            loss = next_token_loss(out.logits, own)
            if not bool(loss.isfinite()):
                raise AnabranchError(f"the loss of step {len(losses)} is no number", received=loss.item())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(chosen.parameters(), config.max_grad_norm)
            if not bool(norm.isfinite()):  # clipped, it would make every chosen weight NaN
                raise AnabranchError(f"the gradient of step {len(losses) - 1} is no number", received=norm.item())
            optimizer.step()
    if not losses:
        raise UsageError("nothing was trained", expected="at least one batch", received="none")
    return Tuned(read_experts(model, chosen.experts, base, whole=chosen.whole, facts=facts), tuple(losses))


def build_optimizer(chosen: ChosenExperts, config: Training) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in chosen.named_parameters().items():
        groups["bias" not in name].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": own, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, own in groups.items()
            if own
        ],
        lr=config.learning_rate,
        betas=config.betas,
    )
