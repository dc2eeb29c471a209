# SPDX-License-Identifier: Apache-2.0
"""What calibration text does inside a mixture: inputs, logits and decisions of every layer, padding left out.

Shapes    : B rows of S tokens, T real tokens of all batches, D width, N experts, K chosen per token.

A batch is what a tokenizer returns: `input_ids` (B, S) and, where there is padding, `attention_mask` (B, S).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer, evaluating
from anabranch.models.mixtures.routing import Seen, watched

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Captured:
    """One layer over all calibration tokens."""

    hidden_states: Tensor  # (T, D)
    router_logits: Tensor  # (T, N)
    routing_weights: Tensor  # (T, K)
    selected_experts: Tensor  # (T, K)

    def usage(self, num_experts: int) -> Tensor:
        """(N,) float64: tokens sent to each expert."""
        return torch.bincount(self.selected_experts.flatten(), minlength=num_experts).double()


def real_tokens(batch: Batch) -> Tensor:
    """(B S,) bool."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).reshape(-1).bool()


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Without noise of training and without gradients; the mode comes back as it was."""
    with evaluating(model), torch.no_grad():
        yield


def run(model: Any, batch: Batch) -> Tensor:
    """(B, S, V), the logits of the vocabulary."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def captured(model: Any, layers: Sequence[MixtureLayer], batches: Iterable[Batch]) -> dict[str, Captured]:
    """By name of the layer; every layer has run on the same tokens."""
    parts: dict[str, list[tuple[Tensor, ...]]] = {layer.name: [] for layer in layers}
    with reading(model):
        for batch in batches:
            real_T = real_tokens(batch)

            def take(seen: Seen, real_T: Tensor = real_T) -> None:
                parts[seen.layer.name].append(tuple(value[real_T] for value in (seen.hidden_states, *seen.triple)))

            with watched(layers, take):
                run(model, batch)
    refuse_empty(sum(len(part[0]) for part in parts[layers[0].name]))
    return {name: Captured(*(torch.cat(values) for values in zip(*own, strict=True))) for name, own in parts.items()}


def refuse_empty(num_tokens: int) -> None:
    if not num_tokens:
        raise UsageError("there is no calibration text", expected="at least one real token", received=0)
