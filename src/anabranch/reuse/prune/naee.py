# SPDX-License-Identifier: Apache-2.0
"""NAEE pruning: in each layer keep the set of experts that changes the layer's output least on calibration text.

Paper     : Lu et al. 2024 (arXiv 2402.14800, ACL 2024), its expert pruning.
Equation  : S* = argmin over |S| = R of || F(X) - F_S(X) ||_F;  F_S routes over S alone and weighs anew
Shapes    : T calibration tokens, D width, N experts, R kept, K chosen per token.
Differs   : one norm over all calibration tokens, not a sum of norms over batches, so that batching changes nothing;
            above 12 experts by greedy removal, and the result says which it was; groups of grouped families stay equal.
Check     : every set equals the sliced layer run on its own; a duplicate goes first
            (tests/reuse/prune/test_naee.py).
Exempt    : dtype (sets of nearly the same error are parted by the rounding of the model)

Every expert is run once on each token; all sets are scored from these outputs. Progressive: a layer sees the text as it
comes through the layers already pruned, for one more pass over the text a layer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from anabranch.models.mixtures.bank import run_slots
from anabranch.models.mixtures.layers import MixtureLayer, Triple, open_layers
from anabranch.reuse.calibration import Batch, captured
from anabranch.reuse.prune.keep import Keep, Protect, check_count, groups, masked, protected

EXACT_UP_TO = 12
"""Experts of a layer up to which all sets are tried: 924 at most."""
CHUNK = 2048


@dataclass(frozen=True)
class Found:
    keep: Keep
    errors: dict[str, float]
    """|| F - F_S ||_F / || F ||_F of the kept set, by name of the layer."""
    exact: bool
    """All sets were tried; False: experts were removed one by one, the cheapest first."""


class Reconstruction:
    """|| F - F_S ||_F of any set of one layer, from one dense run."""

    def __init__(self, layer: MixtureLayer, hidden_states: Tensor, router_logits: Tensor):
        everyone_TN = torch.arange(layer.num_experts, device=hidden_states.device).expand(len(hidden_states), -1)
        parts = zip(torch.split(hidden_states, CHUNK), torch.split(everyone_TN, CHUNK), strict=True)
        self.layer, self.logits_TN = layer, router_logits
        self.outputs_TND = torch.cat([run_slots(layer, h, index) for h, index in parts])
        self.dense_TD = self.mixed(layer.rescore(router_logits))

    def mixed(self, triple: Triple) -> Tensor:
        """sum_k g_k E_k(x), (T, D) in float32."""
        index_TKD = triple.selected_experts[..., None].expand(-1, -1, self.outputs_TND.shape[-1])
        chosen_TKD = self.outputs_TND.gather(1, index_TKD).float()
        return (triple.routing_weights.float()[..., None] * chosen_TKD).sum(1)

    def error(self, keep: Sequence[int]) -> float:
        off = torch.ones(self.layer.num_experts, dtype=torch.bool, device=self.logits_TN.device)
        off[list(keep)] = False
        triple = self.layer.rescore(self.logits_TN, off)
        return float((self.dense_TD - self.mixed(triple)).double().norm())


def subsets(layer: MixtureLayer, num_keep: int, held: set[int]) -> Iterable[list[int]]:
    """Every set of `num_keep` that holds the protected ones, equally many of each group."""
    each = num_keep // layer.num_groups
    for parts in product(*(combinations(group, each) for group in groups(layer))):
        chosen = [expert for part in parts for expert in part]
        if held <= set(chosen):
            yield chosen


def exact(layer: MixtureLayer, found: Reconstruction, num_keep: int, held: set[int]) -> list[int]:
    return min(subsets(layer, num_keep, held), key=found.error)


def greedy(layer: MixtureLayer, found: Reconstruction, num_keep: int, held: set[int]) -> list[int]:
    """Removes the expert whose loss adds least, until `num_keep` are left."""
    kept, each = list(range(layer.num_experts)), num_keep // layer.num_groups
    while len(kept) > num_keep:
        crowded = [e for group in groups(layer) if len(set(group) & set(kept)) > each for e in group if e in kept]
        trials = [[other for other in kept if other != e] for e in crowded if e not in held]
        kept = min(trials, key=found.error)
    return kept


def best(
    layer: MixtureLayer, hidden_states: Tensor, router_logits: Tensor, num_keep: int, held: set[int]
) -> tuple[list[int], float]:
    """The set to keep and its relative error."""
    found = Reconstruction(layer, hidden_states, router_logits)
    choose = exact if layer.num_experts <= EXACT_UP_TO else greedy
    chosen = choose(layer, found, num_keep, held)
    return chosen, found.error(chosen) / max(float(found.dense_TD.double().norm()), math.ulp(0.0))


@torch.no_grad()
def search(model: Any, batches: Iterable[Batch], num_keep: int, protect: Protect = ()) -> Found:
    """Every layer on the text as the whole model sees it: one pass."""
    layers, held = prepared(model, num_keep, protect)
    seen = captured(model, layers, batches)
    chosen = {
        layer.name: best(layer, (own := seen[layer.name]).hidden_states, own.router_logits, num_keep, held[layer.name])
        for layer in layers
    }
    return of(layers, chosen)


@torch.no_grad()
def search_progressive(model: Any, batches: Sequence[Batch], num_keep: int, protect: Protect = ()) -> Found:
    """Every layer on the text as the layers pruned before it leave it: a pass a layer."""
    layers, held = prepared(model, num_keep, protect)
    chosen: dict[str, tuple[list[int], float]] = {}
    for layer in layers:
        with masked(layers, {name: keep for name, (keep, _) in chosen.items()}):
            own = captured(model, [layer], batches)[layer.name]
        chosen[layer.name] = best(layer, own.hidden_states, own.router_logits, num_keep, held[layer.name])
    return of(layers, chosen)


def prepared(model: Any, num_keep: int, protect: Protect) -> tuple[list[MixtureLayer], dict[str, set[int]]]:
    layers = open_layers(model)
    check_count(layers, num_keep)
    return layers, protected(layers, protect, num_keep)


def of(layers: Sequence[MixtureLayer], chosen: dict[str, tuple[list[int], float]]) -> Found:
    keep, errors = (
        {name: own for name, (own, _) in chosen.items()},
        {name: error for name, (_, error) in chosen.items()},
    )
    return Found(keep, errors, all(layer.num_experts <= EXACT_UP_TO for layer in layers))
