# SPDX-License-Identifier: Apache-2.0
"""Slots that are passed over: weight 0 at a valid index, and a count of them.

Shapes    : T tokens, K chosen per token.

A stock model computes a slot of weight 0 like any other: the count says what a runtime that leaves it out would save.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer, Triple


@dataclass
class Skipped:
    """Slots of real tokens, by name of the layer."""

    skipped: Counter[str] = field(default_factory=Counter)
    slots: Counter[str] = field(default_factory=Counter)

    def share(self, layer: str | None = None) -> float:
        """Skipped slots over all slots, of one layer or of all."""
        if layer is not None:
            return self.skipped[layer] / max(self.slots[layer], 1)
        return self.skipped.total() / max(self.slots.total(), 1)

    def add(self, layer: MixtureLayer, skip: Tensor, attention_mask: Tensor | None) -> None:
        real_T = real(layer, skip, attention_mask)
        self.skipped[layer.name] += int(skip[real_T].sum())
        self.slots[layer.name] += int(real_T.sum()) * skip.shape[1]


def real(layer: MixtureLayer, skip: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(T,) bool; without a mask every token is real."""
    if attention_mask is None:
        return torch.ones(len(skip), dtype=torch.bool, device=skip.device)
    if attention_mask.numel() != len(skip):
        raise UsageError(
            f"the mask is not of the tokens that {layer.name} got", expected=len(skip), received=attention_mask.numel()
        )
    return attention_mask.reshape(-1).bool().to(skip.device)


def without(triple: Triple, skip: Tensor, *, keep_sum: bool) -> Triple:
    """Weight 0 where `skip` (T, K); the others as they are, or scaled to the former sum of the token."""
    weights_TK = triple.routing_weights.masked_fill(skip, 0)
    if keep_sum:
        before_T1, after_T1 = triple.routing_weights.sum(-1, keepdim=True), weights_TK.sum(-1, keepdim=True)
        scaled_TK = weights_TK * (before_T1 / after_T1.clamp(min=torch.finfo(after_T1.dtype).tiny))
        weights_TK = torch.where(skip.any(-1, keepdim=True) & (after_T1 > 0), scaled_TK, weights_TK)
    return triple._replace(routing_weights=weights_TK)
