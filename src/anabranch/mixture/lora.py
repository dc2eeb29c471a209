# SPDX-License-Identifier: Apache-2.0
"""LoRA experts in PEFT's own layers: the context says which of them acts on which token.

Equation  : y_t = W0 x_t + alpha s B_e A_e d(x_t) + (1 - alpha) s B_u A_u d(x_t)   e the id of token t, u the universal
            y_t = W0 x_t + s B_e A_e d(x_t)                                        without a universal expert
Shapes    : x (B, N, I), y (B, N, O); E experts of rank r; ids (B, N) or (B,). An id may also be NOBODY (no expert acts,
            the universal one does) or EVERYBODY (the mean of all experts).
Paths     : dense, one product with all A stacked and one with all B, the hidden ranks of other experts set to zero;
            segment, a product an expert over its tokens; gathered, an own A and B for every token.
            They agree to float tolerance. Dense is the default: it costs the same whatever the ids are.

Adapters keep their names, parameters and files; only the forward of their layers is another one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Frame, Slot, missing_context

NOBODY, EVERYBODY = -1, -2
Path = Literal["dense", "segment", "gathered"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which adapters of a layer are experts, and what each token gets of them."""

    experts: tuple[str, ...]
    universal: str | None
    alpha: float = 0.5
    """Weight of the token's expert beside the universal one; without a universal one it is 1."""
    key: str = "step"
    """Whose ids in the context choose the expert."""
    path: Path = "dense"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError("alpha is a share", expected="a number from 0 to 1", received=self.alpha)
        if not self.experts or len(set(self.names)) != len(self.names):
            raise UsageError("experts are named once each", received=", ".join(self.names))

    @property
    def names(self) -> tuple[str, ...]:
        return self.experts if self.universal is None else (*self.experts, self.universal)

    def table(self) -> Tensor:
        """(E + 2, names): what a token of each id gets of each adapter; the last two rows are EVERYBODY and NOBODY."""
        num = len(self.experts)
        share = 1.0 if self.universal is None else self.alpha
        rows = torch.zeros(num + 2, len(self.names))
        rows[:num, :num] = share * torch.eye(num)
        rows[EVERYBODY, :num] = share / num
        if self.universal is not None:
            rows[:, num] = 1 - share
        return rows


def route_lora(model: nn.Module, plan: Plan) -> list[str]:
    """Let `plan` decide in every LoRA layer of a PEFT model that has its adapters; the names of these layers.

    Raises:
        UsageError: no such layer, a layer without one of the adapters, or one that is more than plain LoRA (DoRA).
    """
    layers = lora_layers(model)
    if not layers:
        raise UsageError("this model has no LoRA layer, nothing would be routed", received=type(model).__name__)
    for name, layer in layers.items():
        check(name, layer, plan)
    for layer in layers.values():
        become_routed(layer)
        layer.plan, layer.slot = plan, Slot()
    return list(layers)


def become_routed(layer: Any) -> None:
    if not isinstance(layer, RoutedLora):
        layer.__class__ = routed(type(layer))  # type: ignore[arg-type]  # mypy: no metaclass is hashable


@cache
def routed(kind: Any) -> Any:
    """One class for all layers of a kind: a compiler that meets another class for each gives up after the eighth."""
    return type(f"Routed{kind.__name__}", (RoutedLora, kind), {"kind": kind})


def unroute_lora(model: nn.Module) -> None:
    """PEFT's own layers again."""
    for module in model.modules():
        if isinstance(module, RoutedLora):
            del module.plan, module.slot
            module.__class__ = module.kind  # type: ignore[assignment]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's linear LoRA layers by name, known by what they hold; those of embeddings and of single rows are none."""
    found = {}
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if hasattr(module, "base_layer") and isinstance(factors, nn.ModuleDict) and len(factors):
            found[name] = module
    return found


def check(name: str, layer: Any, plan: Plan) -> None:
    if missing := [adapter for adapter in plan.names if adapter not in layer.lora_A]:
        raise UsageError(
            f"{name} has no adapter {missing[0]!r}",
            expected=f"{', '.join(plan.names)} on the same layers",
            received=", ".join(layer.lora_A),
        )
    strange = [adapter for adapter in plan.names if layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter)]
    if strange or not hasattr(layer.lora_A[plan.names[0]], "weight") or layer.lora_A[plan.names[0]].weight.ndim != 2:
        raise UsageError(
            f"{name} is more than a plain LoRA layer", expected="LoRA on linear layers, no DoRA, no bias",
            received=type(layer).__name__,
        )  # fmt: skip
    ranks = {adapter: layer.r[adapter] for adapter in plan.names}
    if len(set(ranks.values())) != 1:
        told = ", ".join(f"{adapter} {rank}" for adapter, rank in ranks.items())
        raise UsageError(f"the experts of {name} differ in rank", expected="one rank", received=told)


class RoutedLora(nn.Module):
    """What `route_lora` makes of a LoRA layer."""

    plan: Plan
    slot: Slot
    kind: type[nn.Module]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise UsageError(
                "an adapter is merged into the weights, where it acts on every token",
                expected="adapters beside the weights",
                received=", ".join(self.merged_adapters),
                hint="unmerge_adapter()",
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        frame = self.slot.current()
        if frame is None:
            raise missing_context(f"the {self.plan.key} of its tokens", f'ids={{"{self.plan.key}": ...}}')
        if x.ndim != 3:
            raise UsageError("experts are chosen for tokens in (B, N, I)", received=tuple(x.shape))
        first = self.plan.names[0]
        x = self.lora_dropout[first](self._cast_input_dtype(x, self.lora_A[first].weight.dtype))
        ids = checked_ids(frame, self.plan, x)
        if self.plan.path != "dense":
            path = by_segment if self.plan.path == "segment" else gathered
            return y + path(self, x, ids).to(y.dtype)
        A, B = stacks(self, frame)
        hidden = nn.functional.linear(x, A) * rank_mask(frame, self.plan, ids, len(A), x)
        return y + nn.functional.linear(hidden, B).to(y.dtype)


def rank_mask(frame: Frame, plan: Plan, ids: Tensor, ranks: int, x: Tensor) -> Tensor:
    """(B, N, names x r): the table's row of every token. Layers of one pass share it."""
    memo, key = frame.context.memo, (plan, ranks, x.dtype, x.device)
    kept = memo.get(key)
    if kept is None or kept[0] is not frame.context.ids[plan.key]:
        table = plan.table().repeat_interleave(ranks // len(plan.names), dim=1).to(x)
        kept = memo[key] = (frame.context.ids[plan.key], table[ids.to(x.device)])
    mask: Tensor = kept[1]
    return mask


def checked_ids(frame: Frame, plan: Plan, x: Tensor) -> Tensor:
    """(B, N) or (B, 1); what the first layer of a pass has looked at the others take as it is."""
    ids, memo, key = frame.token_ids(plan.key, x.shape[0], x.shape[1]), frame.context.memo, ("checked", plan)
    if memo.get(key) is not frame.context.ids[plan.key]:
        low, high = int(ids.min()), int(ids.max())
        if low < EVERYBODY or high >= len(plan.experts):
            raise UsageError(
                f"there is no expert for a {plan.key} id",
                expected=f"0 to {len(plan.experts) - 1}, or {NOBODY} for none, {EVERYBODY} for all",
                received=high if high >= len(plan.experts) else low,
            )
        memo[key] = frame.context.ids[plan.key]
    return ids


def stacks(layer: Any, frame: Frame) -> tuple[Tensor, Tensor]:
    """All A below one another (names x r, I), all s B beside one another (O, names x r).

    Where nothing learns they are made once a context: a generation is one, however many tokens it has.
    """
    memo, keep = frame.context.memo, not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if keep and (kept := memo.get(id(layer))) is not None:
        A, B = kept
        return A, B
    names = layer.plan.names
    A = torch.cat([layer.lora_A[name].weight for name in names])
    B = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
    if keep:
        memo[id(layer)] = (A, B)
    return A, B


def low_rank(layer: Any, name: str, x: Tensor) -> Tensor:
    """s B A x of one adapter."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return nn.functional.linear(nn.functional.linear(x, a), b * layer.scaling[name])


def by_segment(layer: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The universal expert on all tokens, every other one on its own."""
    plan, ids = layer.plan, ids.expand(x.shape[:2])
    table = plan.table().to(x)
    if plan.universal is None:
        y = x.new_zeros(*x.shape[:2], layer.out_features)
    else:
        y = low_rank(layer, plan.universal, x) * table[0, -1]
    for number, name in enumerate(plan.experts):
        for chosen, weight in ((ids == number, table[number, number]), (ids == EVERYBODY, table[EVERYBODY, number])):
            rows = chosen.nonzero(as_tuple=True)
            if len(rows[0]):
                y = y.index_put(rows, low_rank(layer, name, x[rows]) * weight, accumulate=True)
    return y


def gathered(layer: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Every token with an A and a B of its own: for few tokens and many experts."""
    plan = layer.plan
    if bool((ids == EVERYBODY).any()):
        return by_segment(layer, x, ids)
    A = torch.stack([layer.lora_A[name].weight for name in plan.experts])
    B = torch.stack([layer.lora_B[name].weight * layer.scaling[name] for name in plan.experts])
    ids = ids.expand(x.shape[:2])
    chosen, share = ids.clamp(min=0), plan.table()[0, 0].to(x) * (ids >= 0)[..., None]
    hidden = torch.einsum("bni,bnri->bnr", x, A[chosen])
    y: Tensor = torch.einsum("bnr,bnor->bno", hidden, B[chosen]) * share
    if plan.universal is not None:
        y = y + low_rank(layer, plan.universal, x) * plan.table()[0, -1].to(x)
    return y
