# SPDX-License-Identifier: Apache-2.0
"""The layer that branches and rejoins: a router, a bank of experts, and the record of what was decided.

Equation  : y = sum_k w_k E_{i_k}(x),  with a universal expert G: y = sum_k w_k E_{i_k}(x) + (1 - sum_k w_k) G(x)
Shapes    : B samples, N tokens, D width; hidden states (B, N, D). By sample: (B, ...), whatever the experts take.

It takes the place of the module its experts are copies of. Auxiliary losses and statistics are computed from
`routings(model)` after the forward, not inside the layer.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Slot, in_backward
from anabranch.mixture.dispatch import dispatch
from anabranch.mixture.experts import Bank
from anabranch.mixture.routing import Router, Routing


class Mixture(nn.Module):
    def __init__(self, router: Router, bank: Bank, *, universal: nn.Module | None = None):
        super().__init__()
        if router.num_experts != bank.num_experts:
            raise UsageError(
                "router and bank differ", expected=f"{bank.num_experts} experts", received=f"{router.num_experts}"
            )
        self.router, self.bank, self.universal = router, bank, universal
        self.slot = Slot()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.ndim != 3 and self.router.per == "token":
            raise UsageError("tokens are routed in (B, N, D)", received=tuple(hidden_states.shape))
        routing: Routing = self.router(hidden_states, self.slot.current())
        if not in_backward():
            self.slot.routing = routing
        y = self.through_experts(hidden_states, routing, **shareable(args, kwargs))
        if self.universal is None:
            return y
        rest_R = 1 - routing.routing_weights.sum(-1).to(y.dtype)
        rest = rest_R.view(*y.shape[:-1], 1) if routing.per == "token" else rest_R.view(-1, *[1] * (y.ndim - 1))
        return y + rest * cast(Tensor, self.universal(hidden_states))

    def through_experts(self, hidden_states: Tensor, routing: Routing, **extras: Any) -> Tensor:
        """sum_k w_k E_{i_k}(x)"""
        return dispatch(hidden_states, routing, self.bank, **extras)


def shareable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options that mean the same for each subset of the rows; a block may be called with `None` for an absent mask."""
    if any(argument is not None for argument in args):
        raise UsageError(
            "a mixture layer takes hidden states and keyword options only", received=f"{len(args) + 1} inputs"
        )
    tensors = [name for name, option in kwargs.items() if isinstance(option, Tensor)]
    if tensors:
        raise UsageError("experts see parts of the batch, other tensors cannot be split", received=", ".join(tensors))
    return {name: option for name, option in kwargs.items() if option is not None}


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixture layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


def routings(model: nn.Module) -> dict[str, Routing]:
    """Take the routing of the last forward from each layer. A second call finds nothing: no graph outlives its step."""
    taken = {}
    for name, layer in mixtures(model).items():
        if layer.slot.routing is not None:
            taken[name], layer.slot.routing = layer.slot.routing, None
            if learns(layer) and torch.is_grad_enabled() and not taken[name].router_logits.requires_grad:
                raise UsageError(
                    f"the routing of {name} has no gradients: a loss on it would teach the router nothing",
                    hint="use_reentrant=False for gradient checkpointing; torch.no_grad() around this for statistics",
                )
    return taken


def learns(layer: Mixture) -> bool:
    return layer.training and any(parameter.requires_grad for parameter in layer.router.parameters())
