# SPDX-License-Identifier: Apache-2.0
"""LoRA experts in PEFT's own layers, chosen by a router that learns: by token, or by the cluster of the sample.

Papers    : MoE-LoRA with a gate of tokens: MixLoRA (arXiv 2404.15159), MoELoRA (arXiv 2402.12851);
            MoCLE, cluster-conditional LoRA experts with a universal one (arXiv 2312.12379).
Equation  : y_t = W0 x_t + s sum over the K chosen of w_te B_e A_e d(x_t)  [ + (1 - sum_e w_te) s B_u A_u d(x_t) ]
Shapes    : x (B, N, I), y (B, N, O); E experts of rank r, every layer with a router of its own.
Differs   : MoCLE hands the weight that its gate does not give away to the universal expert, in each layer alike.
Check     : a loop over tokens and experts; a cluster's rows are treated alike (tests/mixture/test_lora_router.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Slot, in_backward
from anabranch.mixture.lora import Plan, check, lora_layers
from anabranch.mixture.losses import balance_loss
from anabranch.mixture.routing import Router, Routing


def learn_routes(
    model: nn.Module, experts: tuple[str, ...], universal: str | None, make_router: Callable[[int], Router]
) -> list[str]:
    """Give every LoRA layer that has these adapters a router, made for its width; the names of these layers.

    The routers are parameters of the model and are trained with it.

    Raises:
        UsageError: no such layer, a layer without one of the adapters, or one that is more than plain LoRA.
    """
    layers = lora_layers(model)
    if not layers:
        raise UsageError("this model has no LoRA layer, nothing would be routed", received=type(model).__name__)
    for name, layer in layers.items():
        check(name, layer, Plan(experts=experts, universal=universal))
    for layer in layers.values():
        kind = getattr(layer, "kind", type(layer))
        layer.__class__ = type(f"Gated{kind.__name__}", (GatedLora, kind), {"kind": kind})
        layer.names, layer.universal, layer.slot = experts, universal, Slot()
        layer.router = make_router(layer.in_features)
    return list(layers)


def balance_of(model: nn.Module) -> Tensor:
    """Mean over the layers of the balance loss of their last forward, which is then forgotten; 1: the load is even."""
    slots = [layer.slot for layer in model.modules() if isinstance(layer, GatedLora)]
    seen = [slot.routing for slot in slots if slot.routing is not None]
    if not seen:
        raise UsageError("nothing was routed yet", expected="a forward before the loss of its routing")
    for slot in slots:
        slot.routing = None
    return torch.stack([balance_loss(routing) for routing in seen]).mean()


class GatedLora(nn.Module):
    """What `learn_routes` makes of a LoRA layer."""

    names: tuple[str, ...]
    universal: str | None
    slot: Slot
    kind: type[nn.Module]
    router: Router

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise UsageError("an adapter is merged into the weights, where it acts on every token",
                             expected="adapters beside the weights", hint="unmerge_adapter()")  # fmt: skip
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        routing = self.router(x, self.slot.current())
        if not in_backward():
            self.slot.routing = routing
        shares = coefficients(routing, x.shape[0], x.shape[1], self.universal is not None).to(x.dtype)
        names = self.names if self.universal is None else (*self.names, self.universal)
        A = torch.cat([self.lora_A[name].weight for name in names])
        B = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
        x = self.lora_dropout[names[0]](self._cast_input_dtype(x, A.dtype))
        hidden = nn.functional.linear(x, A) * shares.repeat_interleave(len(A) // len(names), dim=-1)
        return y + nn.functional.linear(hidden, B).to(y.dtype)


def coefficients(routing: Routing, batch: int, length: int, universal: bool) -> Tensor:
    """(B, N or 1, E), with the universal expert's share behind the others'."""
    weights = torch.zeros_like(routing.scores).scatter(1, routing.selected_experts, routing.routing_weights)
    if universal:
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    return weights.view(batch, 1 if routing.per == "sample" else length, -1)
