# SPDX-License-Identifier: Apache-2.0
"""Experts of a group on one set of weights: the mean by usage, copied to every member, or stored once behind an index.

Equation  : W = sum_i f_i W_i / sum_i f_i over a group's members, f_i how often each was used; equal parts if none was
Shapes    : N experts, C groups; labels (N,), the group of each expert.

    tie             every member gets the group's weights: a stock checkpoint of the same configuration
    slice_storage   each group's weights once, in memory; `remapped` sends the router's choice there

The router is not touched by either: members keep their logits, and two chosen members of a group both count.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import MixtureLayer, Triple
from anabranch.models.mixtures.routing import changed
from anabranch.models.mixtures.surgery import FUSED

Labels = dict[str, list[int]]
"""By name of the layer, the group of each expert."""


def members(labels: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        found.setdefault(label, []).append(expert)
    return found


def shares(usage: Tensor) -> Tensor:
    """f_i / sum f, float64; equal parts where nobody was used."""
    usage = usage.double()
    if bool((usage < 0).any()) or not bool(torch.isfinite(usage).all()):
        raise UsageError("usage has to be a count", expected="finite, >= 0", received=usage.tolist())
    return usage / usage.sum() if float(usage.sum()) > 0 else torch.full_like(usage, 1 / len(usage))


def weighted_mean(bank: ExpertBank, group: Sequence[int], usage: Tensor) -> dict[str, Tensor]:
    """The group's tensors by name, float64; usage (n,) of its members."""
    parts = zip(shares(usage).tolist(), (bank[expert].tensors() for expert in group), strict=True)
    sums: dict[str, Tensor] = {}
    for share, tensors in parts:
        for name, value in tensors.items():
            sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + share * value.double()
    return sums


@torch.no_grad()
def tie(
    layer: MixtureLayer, labels: Sequence[int], usage: Tensor,
    make: Callable[[ExpertBank, Sequence[int], Tensor], Mapping[str, Tensor]] = weighted_mean,
) -> None:  # fmt: skip
    """Every group of two or more on the weights that `make` makes of it; an expert on its own is left bit by bit."""
    check_labels(layer, labels)
    bank = ExpertBank(layer)
    for group in members(labels).values():
        if len(group) > 1:
            made = make(bank, group, usage[group])
            for expert in group:
                for name, value in bank[expert].tensors().items():
                    value.copy_(made[name])


@torch.no_grad()
def slice_storage(layer: MixtureLayer, labels: Sequence[int]) -> Tensor:
    """Keeps each group's first member of a tied layer, in place; (N,) int64, where each expert's weights are now.

    Raises:
        UsageError: members of a group differ; nothing was changed.
    """
    check_labels(layer, labels)
    bank, groups = ExpertBank(layer), list(members(labels).values())
    for group in groups:
        for expert in group[1:]:
            if not all(torch.equal(a, b) for a, b in pairs(bank, group[0], expert)):
                raise UsageError(
                    f"{layer.name}: experts {group[0]} and {expert} of a group differ", expected="a tied layer",
                    received="different weights", hint="tie it first",
                )  # fmt: skip
    first = torch.tensor([group[0] for group in groups])
    for name in FUSED:
        value = getattr(layer.experts, name, None)
        if isinstance(value, nn.Parameter):
            setattr(layer.experts, name, nn.Parameter(value[first.to(value.device)].clone(), value.requires_grad))
    layer.experts.num_experts = len(groups)  # type: ignore[assignment]
    index = torch.empty(len(labels), dtype=torch.int64)
    for where, group in enumerate(groups):
        index[group] = where
    return index


@contextmanager
def remapped(layers: Sequence[MixtureLayer], index: Mapping[str, Tensor]) -> Iterator[None]:
    """The router's choice goes to where the weights are: around every forward pass of a sliced model."""

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        selected = triple.selected_experts
        return triple._replace(selected_experts=index[layer.name].to(selected.device)[selected])

    with changed([layer for layer in layers if layer.name in index], change):
        yield


def pairs(bank: ExpertBank, first: int, second: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(bank[first].tensors().values(), bank[second].tensors().values(), strict=True)


def check_labels(layer: MixtureLayer, labels: Sequence[int]) -> None:
    if len(labels) != layer.num_experts:
        raise UsageError(
            f"{layer.name}: groups of another number of experts", expected=layer.num_experts, received=len(labels)
        )
