# SPDX-License-Identifier: Apache-2.0
"""Training of some experts of a stacked parameter: an optimiser sees their slices and nothing else.

with ChosenExperts(model, {"model.layers.1.mlp": [0, 3]}) as chosen:
    optimizer = torch.optim.AdamW(chosen.parameters())
    ...

Every chosen slice is a parameter of its own, which is written into the stacked one before every forward pass and at the
end. The module of the experts computes with the stacked values; their gradient goes on to the slices alone. What is not
chosen is therefore left alone bit for bit: to zero its gradients would not do, as weight decay and the moments of
former steps move parameters without a gradient. Gradients and the optimiser's state are the slices' size.

In half precision the slices are float32: steps of a small learning rate are below the rounding of the weights and would
be lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.mixtures.adapter import fused_of
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.train.sharded import first_row, local, whole

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Slice:
    """One expert's part of a stacked parameter, or all of another."""

    name: str
    """Of the parameter in the model."""
    expert: int | None
    block: nn.Module
    holder: nn.Module
    """The module in the block whose parameter it is."""
    own: nn.Parameter
    """What the optimiser steps."""

    @property
    def part(self) -> str:
        """What the holder calls the parameter."""
        return self.name.rpartition(".")[2]

    @property
    def key(self) -> str:
        return self.name if self.expert is None else f"{self.name}.{self.expert}"

    @property
    def lodged(self) -> str:
        """A name that a module allows for a parameter."""
        return self.key.replace(".", "/")

    def now(self) -> Tensor:
        """`own`, or what stands for it where the model is sharded."""
        lodged = self.block._parameters.get(self.lodged)
        return self.own if lodged is None else lodged

    @torch.no_grad()
    def write(self) -> None:
        """Into the parameter; of one that is sharded, into the rows that this process holds."""
        stacked, values = cast(Tensor, self.holder._parameters[self.part]), whole(self.now())
        rows, first = local(stacked.data), first_row(stacked)
        if self.expert is None:
            rows.copy_(values[first : first + len(rows)])
        elif first <= self.expert < first + len(rows):
            rows[self.expert - first].copy_(values)


class Linked(torch.autograd.Function):
    """The stacked values as they are, where the slices were written; their gradient at the slices, to these."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, experts: Sequence[int | None], *own: Tensor) -> Tensor:  # type: ignore[override]
        ctx.experts, ctx.like = experts, [(value.dtype, value.device) for value in own]
        return stacked.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = [grad if expert is None else grad[expert] for expert in ctx.experts]
        # a view would keep all of the gradient
        return None, None, *(part.to(d, t, copy=True) for part, (t, d) in zip(parts, ctx.like, strict=True))


class Lending:
    """While its forward pass runs, a module has linked tensors in place of its parameters."""

    def __init__(self, holder: nn.Module, slices: Sequence[Slice]):
        self.holder, self.mine = holder, dict[str, list[Slice]]()
        for own in slices:
            self.mine.setdefault(own.part, []).append(own)
        self.kept: dict[str, Any] = {}

    def begin(self, module: nn.Module, inputs: Any) -> None:
        parameters: dict[str, Any] = self.holder._parameters
        for part, mine in self.mine.items():
            self.kept[part] = parameters[part]
            linked = Linked.apply(parameters[part], [own.expert for own in mine], *(own.now() for own in mine))
            parameters[part] = linked

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.holder._parameters.update(self.kept)
        self.kept.clear()

    def hooks(self) -> list[Any]:
        begin = self.holder.register_forward_pre_hook(self.begin)
        return [begin, self.holder.register_forward_hook(self.end, always_call=True)]


class ChosenExperts:
    """Inside the `with`, the chosen experts learn and nothing else does.

    experts     by name of the layer
    shared      experts that see every token learn as well, whole
    lodged      slices are parameters of the model's modules too, for what moves or shards these
    """

    def __init__(
        self, model: nn.Module, experts: Mapping[str, Sequence[int]], *, shared: bool = False, lodged: bool = False
    ):
        layers = open_layers(model)
        check_chosen(layers, experts)
        self.model, self.lodged = model, lodged
        self.experts = {layer.name: tuple(sorted(experts.get(layer.name, ()))) for layer in layers}
        self.slices = [own for layer in layers for own in slices_of(layer, self.experts[layer.name])]
        whole = [own for layer in layers for own in shared_of(layer)] if shared else []
        if shared and not whole:
            raise UsageError("no layer has a shared expert", hint="shared=False")
        self.whole = tuple(own.name for own in whole)
        self.slices += whole
        self.hooks: list[Any] = []

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, TENSOR.EXPERT for slices: not the model's own parameters."""
        return {own.key: own.own for own in self.slices}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def touches(self) -> list[str]:
        """Tensors of the model that will change: of stacked ones, the chosen experts' slices alone."""
        return list(dict.fromkeys(own.name for own in self.slices))

    def write(self) -> None:
        """What the slices are now, into the model."""
        for own in self.slices:
            own.write()

    def __enter__(self) -> Self:
        self.learnt = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        holders: dict[nn.Module, list[Slice]] = {}
        for own in self.slices:
            holders.setdefault(own.holder, []).append(own)
            if self.lodged:
                own.block.register_parameter(own.lodged, own.own)
        for holder, mine in holders.items():
            self.hooks += Lending(holder, mine).hooks()
        self.hooks.append(self.model.register_forward_pre_hook(lambda module, inputs: self.write()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        if kind is None:
            self.write()
        for own in self.slices:
            own.block._parameters.pop(own.lodged, None)
        for parameter, before in self.learnt:
            parameter.requires_grad_(before)


def slices_of(layer: MixtureLayer, chosen: Sequence[int]) -> list[Slice]:
    # experts come first in every storage, so each is one piece of it
    return [
        Slice(name, expert, layer.block, layer.experts, own_of(stacked.data[expert]))
        for name, stacked in fused_of(layer).items()
        for expert in chosen
    ]


def shared_of(layer: MixtureLayer) -> list[Slice]:
    if layer.shared_name is None:
        return []
    part = layer.block.get_submodule(layer.shared_name)
    return [
        Slice(f"{layer.name}.{layer.shared_name}.{name}", None, layer.block,
              part.get_submodule(name.rpartition(".")[0]), own_of(parameter.data))
        for name, parameter in part.named_parameters()
    ]  # fmt: skip


def own_of(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(torch.float32 if values.dtype in HALF else values.dtype, copy=True))


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
