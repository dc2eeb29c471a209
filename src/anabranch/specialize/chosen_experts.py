# SPDX-License-Identifier: Apache-2.0
"""Training of some experts of a stacked parameter: an optimiser sees their slices and nothing else.

with ChosenExperts(model, {"model.layers.1.mlp": [0, 3]}) as chosen:
    optimizer = torch.optim.AdamW(chosen.parameters())
    ...

Every chosen slice is a parameter of its own, in the storage of the stacked one; gradients are handed on as soon as
autograd has them. What is not chosen is therefore left alone bit for bit: to zero its gradients would not do, as weight
decay and the moments of former steps move parameters without a gradient. The optimiser's state is the slices' size.

In half precision the slices are float32 copies, written back before every forward pass and at the end: steps of a
small learning rate are below the rounding of the weights and would be lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, UsageError, did_you_mean
from anabranch.models.mixtures.adapter import fused_of
from anabranch.models.mixtures.layers import MixtureLayer, open_layers

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Slice:
    """One expert's part of a stacked parameter, or all of another."""

    name: str
    stacked: nn.Parameter
    expert: int | None
    own: nn.Parameter
    """What the optimiser steps."""
    address: int
    """Of the stacked values when the slice was made."""

    @property
    def copied(self) -> bool:
        return self.own.dtype != self.stacked.dtype

    def part(self, values: Tensor) -> Tensor:
        return values if self.expert is None else values[self.expert]


class ChosenExperts:
    """Inside the `with`, the chosen experts learn and nothing else does.

    experts     by name of the layer
    shared      experts that see every token learn as well, whole
    """

    def __init__(self, model: nn.Module, experts: Mapping[str, Sequence[int]], *, shared: bool = False):
        layers = open_layers(model)
        check_chosen(layers, experts)
        self.model = model
        self.experts = {layer.name: tuple(sorted(experts.get(layer.name, ()))) for layer in layers}
        self.slices = [own for layer in layers for own in slices_of(layer, self.experts[layer.name])]
        whole = [own for layer in layers for own in shared_of(layer)] if shared else []
        if shared and not whole:
            raise UsageError("no layer has a shared expert", hint="shared=False")
        self.whole = tuple(own.name for own in whole)
        self.slices += whole
        self.hooks: list[Any] = []

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, TENSOR.EXPERT for slices: not the model's own parameters, but in their storage."""
        return {own.name if own.expert is None else f"{own.name}.{own.expert}": own.own for own in self.slices}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def touches(self) -> list[str]:
        """Tensors of the model that will change: of stacked ones, the chosen experts' slices alone."""
        return list(dict.fromkeys(own.name for own in self.slices))

    @torch.no_grad()
    def write(self) -> None:
        """Slices that are copies, back into the model."""
        for own in self.slices:
            check_place(own)
            if own.copied:
                own.part(own.stacked.data).copy_(own.own)

    def __enter__(self) -> Self:
        self.learnt = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        stacked: dict[nn.Parameter, list[Slice]] = {}
        for own in self.slices:
            stacked.setdefault(own.stacked, []).append(own)
        for parameter, mine in stacked.items():
            parameter.requires_grad_(True)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(handing_on(mine)))  # type: ignore[no-untyped-call]
        self.hooks.append(self.model.register_forward_pre_hook(lambda module, inputs: self.write()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        for parameter, before in self.learnt:
            parameter.requires_grad_(before)
        if kind is None:
            self.write()


def slices_of(layer: MixtureLayer, chosen: Sequence[int]) -> list[Slice]:
    # experts come first in every storage, so each is one piece of it
    return [slice_of(name, stacked, expert) for name, stacked in fused_of(layer).items() for expert in chosen]


def shared_of(layer: MixtureLayer) -> list[Slice]:
    if layer.shared_name is None:
        return []
    prefix, part = f"{layer.name}.{layer.shared_name}", layer.block.get_submodule(layer.shared_name)
    return [slice_of(f"{prefix}.{name}", parameter, None) for name, parameter in part.named_parameters()]


def slice_of(name: str, stacked: nn.Parameter, expert: int | None) -> Slice:
    values = stacked.data if expert is None else stacked.data[expert]
    own = nn.Parameter(values.float() if values.dtype in HALF else values)
    return Slice(name, stacked, expert, own, stacked.data_ptr())


def handing_on(slices: Sequence[Slice]) -> Callable[[Tensor], None]:
    """The stacked parameter's gradient to its chosen slices; the rest is let go at once."""

    def hand_on(stacked: Tensor) -> None:
        grad, stacked.grad = stacked.grad, None
        assert grad is not None, "called after a gradient was accumulated"
        for own in slices:
            check_place(own)
            mine = own.part(grad).to(own.own.dtype, copy=True)  # a view would keep all of it
            own.own.grad = mine if own.own.grad is None else own.own.grad + mine

    return hand_on


def check_place(own: Slice) -> None:
    if own.stacked.data_ptr() != own.address:
        raise AnabranchError(
            f"{own.name} was moved while some of its experts were trained: their steps would be lost",
            hint="move the model to its device and precision before its experts are chosen",
        )


def check_chosen(layers: Sequence[MixtureLayer], experts: Mapping[str, Sequence[int]]) -> None:
    known = {layer.name: layer.num_experts for layer in layers}
    for name, chosen in experts.items():
        if name not in known:
            raise UsageError(f"the model has no mixture {name!r}", hint=did_you_mean(name, known))
        if len(set(chosen)) != len(chosen) or not all(0 <= e < known[name] for e in chosen):
            raise UsageError(
                f"{name} has no such experts", expected=f"different experts of 0 to {known[name] - 1}",
                received=list(chosen),
            )  # fmt: skip
    if not any(len(chosen) for chosen in experts.values()):
        raise UsageError("nothing to train", expected="at least one expert", received="none in any layer")
