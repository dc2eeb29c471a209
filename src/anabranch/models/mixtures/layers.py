# SPDX-License-Identifier: Apache-2.0
"""Where a model's routers and experts are, by structure and never by name of family, and a check by numbers.

Shapes    : T tokens, D width, N experts, K chosen per token, M width of an expert.

A block is a mixture if it holds `experts` and a router beside them. What the rest of the bridge takes for granted is
tried on every layer when the model is opened: a layer that answers differently is refused, not guessed at.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError

ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts")
CORRECTION = "e_score_correction_bias"
TOKENS = 5
OFF = -1e30
FIRST = -4.0
"""Times `off_value`: a group with one expert of the first is before all groups without, whatever else is off in it."""


class Triple(NamedTuple):
    """What a router decided for T tokens."""

    router_logits: Tensor  # (T, N)
    routing_weights: Tensor  # (T, K)
    selected_experts: Tensor  # (T, K) int64


@dataclass(frozen=True, eq=False)
class MixtureLayer:
    """One block of routed experts."""

    name: str
    """Of the block in the model, such as model.layers.3.mlp."""
    block: nn.Module
    router_name: str
    shared_name: str | None
    """Of an expert that sees every token, beside the routed ones."""

    @property
    def router(self) -> nn.Module:
        return self.block.get_submodule(self.router_name)

    @property
    def experts(self) -> nn.Module:
        return self.block.get_submodule("experts")

    @property
    def num_experts(self) -> int:
        return int(self.experts.gate_up_proj.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.router.top_k)  # type: ignore[arg-type]

    @property
    def hidden_size(self) -> int:
        return int(self.router.weight.shape[1])  # type: ignore[union-attr, index]

    @property
    def num_groups(self) -> int:
        """Groups that the selection is limited by; 1 where it is not."""
        unlimited = getattr(self.router, "topk_method", "") == "greedy"  # DeepSeek-V2 says so beside the groups
        return 1 if unlimited else int(getattr(self.router, "num_group", 1) or 1)

    @property
    def expert_hidden_size(self) -> int:
        transposed = getattr(self.experts, "is_transposed", False)
        return int(self.experts.down_proj.shape[1 if transposed else 2])

    def bare_router(self) -> nn.Module:
        """The router as it is now without anybody's hooks, in evaluation mode; it shares the parameters."""
        bare = copy.copy(self.router)
        hooks = {name: type(value)() for name, value in vars(bare).items() if name.endswith("_hooks")}
        bare.__dict__.update(hooks | {"training": False, "_buffers": dict(self.router._buffers)})
        bare.__dict__.pop("forward", None)  # of the instance: it would be bound to the router itself
        return bare

    def scorer(self, dtype: torch.dtype) -> nn.Module:
        """The bare router with the identity for its matrix: it takes logits, and scores as the family does."""
        scorer, parameters = self.bare_router(), dict[str, nn.Parameter | None]()
        for name, value in self.router._parameters.items():
            key = (name, dtype, None if value is None else (value.shape, value.device))
            if value is not None and key not in self.made:
                made = torch.eye(len(value)) if name == "weight" else torch.zeros(value.shape)
                self.made[key] = nn.Parameter(made.to(value.device, dtype), requires_grad=False)
            parameters[name] = None if value is None else self.made[key]
        scorer.__dict__.update({"_parameters": parameters, "hidden_dim": len(self.router.weight)})  # type: ignore[arg-type]
        return scorer

    @cached_property
    def made(self) -> dict[Any, Any]:
        """What scoring would make anew for every token otherwise, by everything that it depends on."""
        return {}

    @property
    def weights_dtype(self) -> torch.dtype:
        """What the router's weights come in: not always that of its logits."""
        dtype = self.router.weight.dtype
        if dtype not in self.made:
            with torch.no_grad():
                self.made[dtype] = self.bare_router()(self.router.weight.new_zeros(1, self.hidden_size))[1].dtype  # type: ignore[operator]
        return self.made[dtype]  # type: ignore[no-any-return]

    def rescore(
        self, router_logits: Tensor, off: Tensor | None = None, *, first: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Triple:  # fmt: skip
        """Weights and selection as the router would make them from these logits.

        off             (N,) bool: experts that can't be chosen; where too few others are left their weight is 0
        first, last     (N,) bool: experts whose logits are the highest or lowest, and that must not lose their place
                        to the bias that some families add for the selection
        """
        if off is not None:
            off = off.to(router_logits.device)
            router_logits = router_logits.masked_fill(off, off_value(router_logits.dtype))
        scorer = self.scorer(router_logits.dtype)
        bias = scorer._buffers.get(CORRECTION)
        if bias is not None:
            low = off_value(bias.dtype)
            for chosen, value in ((first, FIRST * low), (last, low), (off, low)):
                bias = bias if chosen is None else bias.masked_fill(chosen.to(bias.device), value)
            scorer._buffers[CORRECTION] = bias
        _, weights, selected = scorer(router_logits)
        weights = weights.to(self.weights_dtype)
        return Triple(router_logits, weights if off is None else weights.masked_fill(off[selected], 0.0), selected)


def off_value(dtype: torch.dtype) -> float:
    """A logit that no other is below; finite, as minus infinity times zero is no number."""
    return max(OFF, torch.finfo(dtype).min / 8)


def mixture_layers(model: nn.Module) -> list[MixtureLayer]:
    """Every mixture block of the model, in its order.

    Raises:
        UsageError: there is none, or one whose parts are outside the contract.
    """
    found = []
    for name, block in model.named_modules():
        experts = block._modules.get("experts")
        if experts is not None:
            found.append(layer_of(name, block, experts))
    if not found:
        raise UsageError(
            f"{type(model).__name__} is no mixture of experts", expected="blocks that hold routed experts",
            received="none of its modules has experts", hint="anabranch list names what takes dense models",
        )  # fmt: skip
    return found


def layer_of(name: str, block: nn.Module, experts: nn.Module) -> MixtureLayer:
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        raise outside(name, f"{len(experts)} experts as modules of their own", "stacked experts of transformers 5")
    for weight in ("gate_up_proj", "down_proj"):
        value = getattr(experts, weight, None)
        if not isinstance(value, Tensor) or value.ndim != 3:
            shape = "missing" if not isinstance(value, Tensor) else tuple(value.shape)
            raise outside(name, f"{weight} {shape}", f"{weight} of three dimensions, experts first")
    routers = [router for router in ROUTERS if isinstance(block._modules.get(router), nn.Module)]
    if len(routers) != 1:
        raise outside(name, routers or "none", "one router, as gate or router")
    router = block._modules[routers[0]]
    if not isinstance(getattr(router, "weight", None), Tensor) or not hasattr(router, "top_k"):
        raise outside(name, type(router).__name__, "a router with weight and top_k")
    shared = [part for part in SHARED if isinstance(block._modules.get(part), nn.Module)]
    return MixtureLayer(name, block, routers[0], shared[0] if shared else None)


def outside(name: str, received: object, expected: str) -> UsageError:
    return UsageError(
        f"{name} is outside the contract of the bridge", expected=expected, received=received,
        hint="families that pass: anabranch experts families",
    )  # fmt: skip


# the check by numbers


def open_layers(model: nn.Module) -> list[MixtureLayer]:
    """`mixture_layers`, each of which was seen to keep the contract.

    Raises:
        UsageError: as `mixture_layers`; or a layer that answers otherwise than the bridge would work on.
    """
    layers = mixture_layers(model)
    with evaluating(model):
        for layer in layers:
            check_layer(layer)
    return layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and jitter: noise of training is not the router's decision. The mode comes back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def check_layer(layer: MixtureLayer) -> None:
    """Router, scoring, storage of the experts and the sum of the block, on a few drawn tokens."""
    from anabranch.models.mixtures.bank import ExpertBank

    weight = layer.router.weight
    h_TD = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    triple = check_triple(layer, layer.router(h_TD))
    rescored = layer.rescore(triple.router_logits)
    same(layer, "the scoring of its own logits", rescored.selected_experts, triple.selected_experts)
    same(layer, "the scoring of its own logits", rescored.routing_weights, triple.routing_weights)
    routed_TD = layer.experts(h_TD, triple.selected_experts, triple.routing_weights)
    bank, sum_TD = ExpertBank(layer), torch.zeros_like(h_TD, dtype=torch.float32)
    for t in range(TOKENS):
        for weight_, expert in zip(triple.routing_weights[t], triple.selected_experts[t].tolist(), strict=True):
            sum_TD[t] += weight_.float() * bank.run(expert, h_TD[t : t + 1])[0].float()
    same(layer, "the sum of its weighted experts", routed_TD.float(), sum_TD)
    seen: list[Any] = []
    hook = layer.experts.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        layer.block(h_TD[None])
    finally:
        hook.remove()
    if len(seen) != 1:
        raise outside(layer.name, f"its experts ran {len(seen)} times in one pass", "once")
    same(layer, "what its block hands to the experts", seen[0].float(), routed_TD.float())
    check_halves(layer, bank)


def check_halves(layer: MixtureLayer, bank: Any) -> None:
    """What is called the up half goes in as a factor: the middle of two gives the middle, as no gate's does."""
    generator = torch.Generator().manual_seed(1)
    gate, up, other = (torch.randn(TOKENS, layer.expert_hidden_size, generator=generator) for _ in range(3))
    middle = (bank.activate(gate, up) + bank.activate(gate, other)) / 2
    same(layer, "its activation as a factor of up", bank.activate(gate, (up + other) / 2), middle, torch.float32)


def check_triple(layer: MixtureLayer, returned: Any) -> Triple:
    if not isinstance(returned, tuple) or len(returned) != 3:
        received = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
        raise outside(layer.name, f"a router that returns {received}", "logits, weights and indices")
    logits, weights, index = returned
    shapes = [tuple(value.shape) for value in returned]
    expected = [(TOKENS, layer.num_experts), (TOKENS, layer.top_k), (TOKENS, layer.top_k)]
    if shapes != expected or index.dtype != torch.int64:
        raise outside(layer.name, f"a router that returns {shapes}, {index.dtype}", f"{expected}, torch.int64")
    return Triple(logits, weights, index)


def same(layer: MixtureLayer, what: str, received: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Up to the rounding of `dtype`, the model's own where it is left out; compared in float32."""
    own = torch.finfo(dtype or layer.router.weight.dtype).eps  # type: ignore[arg-type]
    tolerance = 50 * max(own, torch.finfo(torch.float32).eps)
    if received.is_floating_point():
        scale = max(float(expected.abs().max()), 1e-6)
        difference = float((received.float() - expected.float()).abs().max()) / scale
    else:
        difference = float((received != expected).sum())
    if not difference <= tolerance:
        raise outside(layer.name, f"{what} differs by {difference:.2g}", f"at most {tolerance:.2g}")
