# SPDX-License-Identifier: Apache-2.0
"""Fewer experts, more experts, another order: the fused storage, the router and the configuration together.

Shapes    : N experts, R kept.

What is left is a stock model of its family: it is saved and loaded by transformers alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import CORRECTION, MixtureLayer, open_layers

FUSED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts; most know two of these names for one value."""


@torch.no_grad()
def keep_experts(model: Any, keep: Mapping[str, Sequence[int]]) -> None:
    """Drop all other experts, in place; every layer keeps as many, and the configuration says how many.

    keep    by name of the layer, the experts to keep, in the order that they will have

    Raises:
        UsageError: nothing was changed: unequal counts, too few for the router, or group limits broken.
    """
    layers = open_layers(model)
    check_keep(layers, keep)
    for layer in layers:
        take(layer, torch.tensor(list(keep[layer.name])))
    set_count(model, len(next(iter(keep.values()))))


@torch.no_grad()
def permute_experts(layer: MixtureLayer, order: Sequence[int]) -> None:
    """Expert `order[i]` becomes expert i, its row of the router with it: the layer computes the same."""
    if sorted(order) != list(range(layer.num_experts)):
        raise UsageError(
            f"{layer.name}: no order of its experts", expected=f"each of 0 to {layer.num_experts - 1} once",
            received=list(order),
        )  # fmt: skip
    if layer.num_groups > 1:
        size = layer.num_experts // layer.num_groups
        if any(len({e // size for e in order[i : i + size]}) > 1 for i in range(0, len(order), size)):
            raise UsageError(
                f"{layer.name} selects by groups: an expert can't leave its own",
                expected=f"groups of {size} in one piece", received=list(order),
            )  # fmt: skip
    take(layer, torch.tensor(list(order)))


def take(layer: MixtureLayer, index: Tensor) -> None:
    for name in FUSED:
        value = getattr(layer.experts, name, None)
        if isinstance(value, nn.Parameter):
            setattr(layer.experts, name, nn.Parameter(value[index.to(value.device)].clone(), value.requires_grad))
    for name, parameter in list(layer.router._parameters.items()):
        if parameter is not None:
            kept = nn.Parameter(parameter[index.to(parameter.device)].clone(), parameter.requires_grad)
            layer.router._parameters[name] = kept
    bias = layer.router._buffers.get(CORRECTION)
    if bias is not None:
        layer.router._buffers[CORRECTION] = bias[index.to(bias.device)].clone()
    resized(layer, len(index))


def resized(layer: MixtureLayer, num_experts: int) -> None:
    """Every module that counts its experts counts anew."""
    for module in (layer.experts, layer.router, layer.block):
        if hasattr(module, "num_experts"):
            module.num_experts = num_experts  # type: ignore[assignment]
    if isinstance(layer.router, nn.Linear):
        layer.router.out_features = num_experts


def set_count(model: Any, num_experts: int) -> None:
    config = model.config.get_text_config()
    names = [name for name in COUNTS if hasattr(config, name)]
    assert names, f"{type(config).__name__} counts no experts"
    for name in names:
        setattr(config, name, num_experts)
    if "num_experts" in vars(model):  # for the balance loss
        model.num_experts = num_experts


def check_keep(layers: Sequence[MixtureLayer], keep: Mapping[str, Sequence[int]]) -> None:
    names = {layer.name for layer in layers}
    if set(keep) != names:
        raise UsageError(
            "the experts to keep do not name every layer", expected=f"{len(names)} layers, such as {layers[0].name}",
            received=f"missing {sorted(names - set(keep))[:3]}, unknown {sorted(set(keep) - names)[:3]}",
        )  # fmt: skip
    for layer in layers:
        chosen = list(keep[layer.name])
        if len(set(chosen)) != len(chosen) or not all(0 <= e < layer.num_experts for e in chosen):
            raise UsageError(
                f"{layer.name} cannot keep these", expected=f"different experts of 0 to {layer.num_experts - 1}",
                received=chosen,
            )  # fmt: skip
        if len(chosen) < layer.top_k:
            raise UsageError(
                f"{layer.name} would keep fewer experts than a token is sent to",
                expected=f"at least {layer.top_k}", received=len(chosen),
            )  # fmt: skip
        check_groups(layer, chosen)
    counts = {len(chosen) for chosen in keep.values()}
    if len(counts) > 1:
        raise UsageError(
            "layers would keep different numbers of experts", expected="one number: the configuration holds only one",
            received=sorted(counts), hint="keep as many in every layer, or steer with the others off",
        )  # fmt: skip


def check_groups(layer: MixtureLayer, chosen: Sequence[int]) -> None:
    """Equal groups, in their order; at least two experts in each where a group is scored by its best two."""
    groups = layer.num_groups
    if groups == 1:
        return
    size = layer.num_experts // groups
    members = [[e // size for e in chosen].count(group) for group in range(groups)]
    least = 2 if CORRECTION in layer.router._buffers else 1
    if len(set(members)) > 1 or members[0] < least or [e // size for e in chosen] != sorted(e // size for e in chosen):
        raise UsageError(
            f"{layer.name} selects among {groups} groups: these experts would break them",
            expected=f"equally many of each group, at least {least}, the groups in their order",
            received=f"{members} by group",
        )  # fmt: skip
    reached = members[0] * int(getattr(layer.router, "topk_group", groups) or groups)
    if reached < layer.top_k:
        raise UsageError(
            f"{layer.name} would keep fewer experts in the groups that a token may use than it is sent to",
            expected=f"at least {layer.top_k}", received=reached,
        )  # fmt: skip


@torch.no_grad()
def append_experts(layer: MixtureLayer, tensors: Mapping[str, Tensor]) -> range:
    """More experts behind the last, which the router does not know: only a changed index reaches them.

    tensors     by name of the fused storage, (A, ...) each

    Returns the indices of the new ones.
    """
    before = layer.num_experts
    storage = {name: value for name in FUSED if isinstance(value := getattr(layer.experts, name, None), nn.Parameter)}
    shapes = {name: tuple(value.shape[1:]) for name, value in storage.items()}
    given = {name: tuple(value.shape[1:]) for name, value in tensors.items()}
    if shapes != given or len({len(value) for value in tensors.values()}) != 1:
        raise UsageError(
            f"{layer.name} cannot take these experts", expected=f"as many of each of {shapes}",
            received={name: tuple(value.shape) for name, value in tensors.items()},
        )  # fmt: skip
    for name, value in storage.items():
        more = tensors[name].to(value)
        setattr(layer.experts, name, nn.Parameter(torch.cat((value, more)), value.requires_grad))
    layer.experts.num_experts = layer.num_experts  # type: ignore[assignment]
    return range(before, layer.num_experts)
