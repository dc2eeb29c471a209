# SPDX-License-Identifier: Apache-2.0
"""Statistics written down by hand, and what every layer did in one pass, for slow loops over the definitions."""

import torch

from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.mixtures.layers import open_layers
from anabranch.models.mixtures.routing import Seen, watched


def handmade(
    tokens: dict[str, float], documents: dict[str, float] | None = None, top_k: int = 2, **sums
) -> ExpertStats:
    """One fold; every sum as (L, N) by label."""
    made = {
        name: torch.stack([torch.as_tensor(of[label], dtype=torch.float64) for label in tokens])[:, None]
        for name, of in sums.items()
    }
    _, _, num_layers, num_experts = next(iter(made.values())).shape
    layers = tuple(f"layer {i}" for i in range(num_layers))
    counted = [torch.tensor([[float(of[label])] for label in tokens]).double() for of in (tokens, documents or tokens)]
    return ExpertStats(tuple(tokens), layers, num_experts, top_k, 1, "", made, *counted)


def recorded(model, batch: Batch, **options) -> list[Seen]:
    """Layer by layer."""
    seen: list[Seen] = []
    with torch.no_grad(), watched(open_layers(model), seen.append, model=model, **options):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return seen


def real_tokens(batch: Batch):
    """(document, position, row of the flat pass, label) of every token that is no padding."""
    _, length = batch.input_ids.shape
    for b, s in batch.attention_mask.nonzero().tolist():
        yield b, s, b * length + s, int(batch.labels[b, s])
