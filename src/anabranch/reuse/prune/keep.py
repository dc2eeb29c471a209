# SPDX-License-Identifier: Apache-2.0
"""From scores to the experts that stay: one number for all layers, a share of the score, or one budget for the model.

Shapes    : L layers, N experts; scores (L, N), higher stays.

    uniform         as many in every layer: can be tried by `masked` and made by `prune`
    cumulative      in every layer the fewest that hold a share of its score: `masked` only
    global_count    so many in the whole model: `masked` only, as a configuration holds one count for all layers
    random_keep     the control that every ranking has to beat

Ties go to the expert of the lower index, and lists are in the order of the experts. Where a family selects by groups,
every group keeps enough for any choice of groups to fill a token's slots. The two ways to switch an expert off differ:
`masked` lets the next one move up, as in a model without it; a weight of zero would leave the slot empty.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import CORRECTION, MixtureLayer, Triple
from anabranch.models.mixtures.routing import changed, off_refill
from anabranch.models.mixtures.surgery import keep_experts

Keep = dict[str, list[int]]
Protect = Iterable[tuple[str, int]]


def uniform(layers: Sequence[MixtureLayer], scores: Tensor, num_keep: int, protect: Protect = ()) -> Keep:
    """The `num_keep` best of every layer, equally many of every group."""
    check_scores(layers, scores)
    check_count(layers, num_keep)
    held = protected(layers, protect, num_keep)
    return each(layers, scores, lambda layer, row: grown(layer, row, held[layer.name], num_keep // layer.num_groups))


def cumulative(layers: Sequence[MixtureLayer], scores: Tensor, mass: float, protect: Protect = ()) -> Keep:
    """In every layer the fewest best whose scores sum to `mass` of the layer's; protected ones and floors count."""
    check_scores(layers, scores)
    if not 0 < mass <= 1:
        raise UsageError("mass is no share", expected="above 0, at most 1", received=mass)
    if bool((scores < 0).any()):
        raise UsageError("scores below zero have no cumulative mass", expected=">= 0", received=float(scores.min()))
    held = protected(layers, protect)

    def fill(layer: MixtureLayer, row: Tensor) -> list[int]:
        chosen, target = grown(layer, row, held[layer.name], floor(layer)), mass * float(row.sum())
        for expert in ranked(row, range(layer.num_experts)):
            if float(row[chosen].sum()) >= target - 1e-12 * abs(target):
                break
            if expert not in chosen:
                chosen.append(expert)
        return chosen

    return each(layers, scores, fill)


def global_count(layers: Sequence[MixtureLayer], scores: Tensor, num_keep: int, protect: Protect = ()) -> Keep:
    """`num_keep` experts of the whole model, the best wherever they are; scores have to be comparable across layers."""
    check_scores(layers, scores)
    held = protected(layers, protect)
    keep = each(layers, scores, lambda layer, row: grown(layer, row, held[layer.name], floor(layer)))
    least, most = sum(len(chosen) for chosen in keep.values()), sum(layer.num_experts for layer in layers)
    if not least <= num_keep <= most:
        raise UsageError(
            "the budget does not fit the model", received=num_keep,
            expected=f"{least} to {most}: every layer keeps its protected experts and enough for a token",
        )  # fmt: skip
    rest = [(-float(scores[i, e]), i, e) for i, layer in enumerate(layers) for e in range(layer.num_experts)
            if e not in keep[layer.name]]  # fmt: skip
    for _, i, expert in sorted(rest)[: num_keep - least]:
        keep[layers[i].name].append(expert)
    return {name: sorted(chosen) for name, chosen in keep.items()}


def random_keep(
    layers: Sequence[MixtureLayer], num_keep: int, generator: torch.Generator, protect: Protect = ()
) -> Keep:
    drawn = torch.rand(len(layers), layers[0].num_experts, generator=generator, dtype=torch.float64)
    return uniform(layers, drawn, num_keep, protect)


@contextmanager
def masked(layers: Sequence[MixtureLayer], keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """All experts but these are off, and the next ones move up: what the pruned model computes.

    A layer that `keep` does not name is left alone. Raises UsageError before anything is changed.
    """
    known = {layer.name: layer for layer in layers}
    off = {}
    for name, chosen in keep.items():
        check_enough(known, name, chosen)
        off[name] = torch.ones(known[name].num_experts, dtype=torch.bool)
        off[name][list(chosen)] = False

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        return off_refill(layer, triple, off[layer.name].to(triple.router_logits.device))

    with changed([known[name] for name in off if off[name].any()], change):
        yield


def prune(model: Any, keep: Mapping[str, Sequence[int]]) -> None:
    """The model itself with these experts alone, in place: saved and loaded by transformers as it is."""
    keep_experts(model, {name: sorted(chosen) for name, chosen in keep.items()})


# what a layer needs


def floor(layer: MixtureLayer) -> int:
    """How many each group has to keep, so that whichever groups a token is sent to, its slots are filled."""
    if layer.num_groups == 1:
        return layer.top_k
    topk_group = int(getattr(layer.router, "topk_group", layer.num_groups) or layer.num_groups)
    scored_by = 2 if CORRECTION in layer.router._buffers else 1  # a group's score: the sum of its best two, or its best
    return max(scored_by, math.ceil(layer.top_k / topk_group))


def groups(layer: MixtureLayer) -> list[list[int]]:
    size = layer.num_experts // layer.num_groups
    return [list(range(group * size, (group + 1) * size)) for group in range(layer.num_groups)]


def ranked(row: Tensor, experts: Iterable[int]) -> list[int]:
    """From the highest score down; among equals the lower index first."""
    return sorted(experts, key=lambda expert: (-float(row[expert]), expert))


def grown(layer: MixtureLayer, row: Tensor, held: set[int], num_each: int) -> list[int]:
    """The held ones, and the best besides, until every group has `num_each`."""
    chosen: list[int] = []
    for group in groups(layer):
        own = [expert for expert in group if expert in held]
        free = [expert for expert in ranked(row, group) if expert not in held]
        chosen += own + free[: max(num_each - len(own), 0)]
    return chosen


def each(
    layers: Sequence[MixtureLayer], scores: Tensor, choose: Callable[[MixtureLayer, Tensor], list[int]]
) -> Keep:  # fmt: skip
    return {layer.name: sorted(choose(layer, scores[i].double().cpu())) for i, layer in enumerate(layers)}


def protected(
    layers: Sequence[MixtureLayer], protect: Protect, num_keep: int | None = None
) -> dict[str, set[int]]:  # fmt: skip
    """By name of the layer; no more of them than every layer and group keeps."""
    held: dict[str, set[int]] = {layer.name: set() for layer in layers}
    for name, expert in protect:
        if name not in held or not 0 <= expert < layers[0].num_experts:
            raise UsageError(
                "a protected expert is not in the model", expected=f"(layer, expert), such as ({layers[0].name!r}, 0)",
                received=(name, expert),
            )  # fmt: skip
        held[name].add(expert)
    for layer in layers:
        each = layer.num_experts if num_keep is None else num_keep // layer.num_groups
        for group in groups(layer):
            if len(held[layer.name] & set(group)) > each:
                raise UsageError(
                    f"{layer.name}: more experts are protected than are kept", received=sorted(held[layer.name]),
                    expected=f"at most {each}" + " of each group" * (layer.num_groups > 1),
                )  # fmt: skip
    return held


# what is refused


def check_scores(layers: Sequence[MixtureLayer], scores: Tensor) -> None:
    expected = (len(layers), layers[0].num_experts)
    if tuple(scores.shape) != expected:
        raise UsageError(
            "the scores are of another model", expected=f"{expected}, layers and experts", received=tuple(scores.shape)
        )
    if not bool(torch.isfinite(scores).all()):
        where = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise UsageError(
            "scores have to be finite", expected="a number for every expert",
            received=f"{float(scores[tuple(where)])} for layer {layers[where[0]].name}, expert {where[1]}",
        )  # fmt: skip


def check_count(layers: Sequence[MixtureLayer], num_keep: int) -> None:
    for layer in layers:
        least = floor(layer) * layer.num_groups
        if num_keep % layer.num_groups or not least <= num_keep <= layer.num_experts:
            of_groups = f", a multiple of its {layer.num_groups} groups" if layer.num_groups > 1 else ""
            raise UsageError(
                f"{layer.name} can't keep so many experts", expected=f"{least} to {layer.num_experts}{of_groups}",
                received=num_keep,
            )  # fmt: skip


def check_enough(known: Mapping[str, MixtureLayer], name: str, chosen: Sequence[int]) -> None:
    if name not in known:
        raise UsageError("the experts to keep name no layer", expected=f"such as {next(iter(known))}", received=name)
    layer = known[name]
    counts = [len(set(chosen) & set(group)) for group in groups(layer)]
    if len(set(chosen)) != len(chosen) or sum(counts) != len(chosen) or min(counts) < floor(layer):
        of_groups = " of each group" if layer.num_groups > 1 else ""
        raise UsageError(
            f"{name} cannot keep these", received=list(chosen),
            expected=f"different experts of 0 to {layer.num_experts - 1}, at least {floor(layer)}{of_groups}",
        )  # fmt: skip
