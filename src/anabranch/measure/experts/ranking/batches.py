# SPDX-License-Identifier: Apache-2.0
"""Labelled token batches, how a collector reads them, and the loss of the next token.

Shapes    : B documents, S tokens of the longest, V words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import evaluating, open_layers


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents side by side, padded on either side."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S), 0 for padding
    labels: Tensor  # (B, S) int64, which label; -1: a token of none
    folds: Tensor  # (B,) int64
    answers: Tensor | None = None
    """(B, S) bool, the tokens that a loss is taken on; not given: all of them."""

    def __post_init__(self) -> None:
        expected = dict.fromkeys(("attention_mask", "labels", "answers"), self.input_ids.shape)
        expected["folds"] = self.input_ids.shape[:1]
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise UsageError(f"a batch whose {name} do not fit", expected=tuple(shape), received=tuple(value.shape))

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


def read(collector: Collector, batches: Iterable[Batch]) -> ExpertStats:
    """One pass over the batches; what the collector has seen then.

    Raises:
        UsageError: a label or fold that the statistics do not have, or no batch at all.
    """
    model, empty = collector.model, True
    with evaluating(model):
        for batch in batches:
            own, empty = batch.to(next(model.parameters()).device), False
            with collector.collecting(own.labels, own.folds, own.attention_mask):
                model(input_ids=own.input_ids, attention_mask=own.attention_mask, use_cache=False, logits_to_keep=1)
    if empty:
        raise UsageError("there is nothing to read", expected="at least one batch", received="none")
    return collector.stats


def read_stats(
    model: Any, batches: Iterable[Batch], labels: Sequence[str], *, num_folds: int = 10, outputs: bool = False,
    residual: bool = False, fingerprint: str = "",
) -> ExpertStats:  # fmt: skip
    """What most rankings take: everything that the plain collector sums up."""
    collector = Collector(
        model, open_layers(model), labels, num_folds=num_folds, outputs=outputs, residual=residual,
        fingerprint=fingerprint,
    )  # fmt: skip
    return read(collector, batches)


def next_token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Each document's mean loss of its answer tokens, given the tokens before: (B, S, V) to (B,)."""
    real_BS = batch.attention_mask.bool()
    asked_BS = real_BS if batch.answers is None else real_BS & batch.answers.bool()
    counted_BS = (asked_BS[:, 1:] & real_BS[:, :-1]).to(logits.device)
    exact_BSV = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses_BS = nn.functional.cross_entropy(exact_BSV.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    return (losses_BS * counted_BS).sum(1) / counted_BS.sum(1).clamp(min=1)
