# SPDX-License-Identifier: Apache-2.0
"""From scores of experts to those that a recipe names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.errors import UsageError

Experts = tuple[tuple[str, int], ...]


def highest(scores: Tensor, layers: Sequence[str], num: int, *, per_layer: bool = False) -> Experts:
    """The `num` experts of highest score, over all layers or in each: scores (L, N), names of the layers."""
    scores_LN = torch.nan_to_num(scores.double(), nan=-torch.inf)
    available = scores_LN.shape[1] if per_layer else scores_LN.numel()
    if not 1 <= num <= available:
        raise UsageError("so many experts can't be chosen", expected=f"1 to {available}", received=num)
    if per_layer:
        order_LN = scores_LN.argsort(dim=-1, descending=True, stable=True)[:, :num]
        return tuple((layers[i], int(e)) for i, row in enumerate(order_LN) for e in row)
    flat = scores_LN.flatten().argsort(descending=True, stable=True)[:num].tolist()
    return tuple((layers[i // scores_LN.shape[1]], i % scores_LN.shape[1]) for i in flat)


def at_most(experts: Experts, limit: int) -> Experts:
    """In their order, not more than `limit` of any layer."""
    count: dict[str, int] = {}
    kept = []
    for layer, expert in experts:
        count[layer] = count.get(layer, 0) + 1
        if count[layer] <= limit:
            kept.append((layer, expert))
    return tuple(kept)
