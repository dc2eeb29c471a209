# SPDX-License-Identifier: Apache-2.0
"""NAEE skipping: a token passes over its second expert where the first has most of the weight.

Paper     : Lu et al. 2024 (arXiv 2402.14800, ACL 2024), its dynamic skipping.
Equation  : beta_l = median over calibration tokens of w2 / w1;  second expert off where w2 < beta_l w1, w1 <- w1 + w2
Shapes    : T tokens; two experts a token, w1 >= w2.
Differs   : the first takes the token's whole weight: 1 where the family normalises, another sum where it does not.
Check     : half of the calibration's second slots are skipped; beta 0 is the model itself
            (tests/reuse/skip/test_naee.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer, Triple, open_layers
from anabranch.models.mixtures.routing import changed
from anabranch.reuse.calibration import Batch, captured
from anabranch.reuse.skip.slots import Skipped, without


def second_over_first(routing_weights: Tensor) -> Tensor:
    """w2 / w1, (T,): in [0, 1], whichever slot the higher weight is in; 0 where both are."""
    low_T, high_T = routing_weights.float().aminmax(dim=-1)
    return torch.where(high_T > 0, low_T / high_T, torch.zeros_like(high_T))


def calibrate(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """beta by name of the layer: the median of w2 / w1, between the two in the middle where their number is even."""
    layers = open_layers(model)
    check_two(layers)
    seen = captured(model, layers, batches)
    return {
        layer.name: float(second_over_first(seen[layer.name].routing_weights).double().quantile(0.5))
        for layer in layers
    }


@contextmanager
def skipping(
    layers: Sequence[MixtureLayer], betas: Mapping[str, float], attention_mask: Tensor | None = None
) -> Iterator[Skipped]:
    """Around forward passes; says how many slots were skipped. A mask, of one pass, leaves padding out of the count."""
    check_two(layers)
    check_betas(layers, betas)
    skipped = Skipped()

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        off_T = second_over_first(triple.routing_weights) < betas[layer.name]
        second_T = triple.routing_weights.float().argmin(-1)
        skip_TK = off_T[:, None] & torch.nn.functional.one_hot(second_T, 2).bool()
        skipped.add(layer, skip_TK, attention_mask)
        return without(triple, skip_TK, keep_sum=True)

    with changed([layer for layer in layers if layer.name in betas], change):
        yield skipped


def check_two(layers: Sequence[MixtureLayer]) -> None:
    for layer in layers:
        if layer.top_k != 2:
            raise UsageError(
                f"{layer.name} sends a token to another number of experts", expected=2, received=layer.top_k,
                hint="reuse/skip/modes knows any number",
            )  # fmt: skip


def check_betas(layers: Sequence[MixtureLayer], betas: Mapping[str, float]) -> None:
    known = {layer.name for layer in layers}
    for name, beta in betas.items():
        if name not in known:
            raise UsageError("a threshold names no layer", expected=f"such as {layers[0].name}", received=name)
        if not beta >= 0:
            raise UsageError(f"{name}: no threshold", expected=">= 0", received=beta)
