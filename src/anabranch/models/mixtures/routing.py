# SPDX-License-Identifier: Apache-2.0
"""Read what a model's routers decide and what its experts put out; change what they decide; leave no trace.

Shapes    : T tokens of a forward pass (rows of the batch one after another), D width, N experts, K chosen per token.

    with watched(layers, take):                 take(Seen) for every layer of every forward pass
    with changed(layers, change):               change(layer, triple) -> triple takes the router's place

Both raise when the `with` is left if a layer has not run inside it: a hook that never fired is a silent no-op.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError
from anabranch.models.mixtures.bank import run_slots
from anabranch.models.mixtures.layers import MixtureLayer, Triple

Change = Callable[[MixtureLayer, Triple], Triple]


@dataclass(frozen=True, eq=False)
class Seen:
    """One layer in one forward pass."""

    layer: MixtureLayer
    triple: Triple
    """As the experts received it, changes of the routing included."""
    hidden_states: Tensor  # (T, D), what the experts received
    routed: Tensor
    """(T, D), the weighted sum of the routed experts; shared ones are not in it."""
    outputs: Tensor | None = None
    """(T, K, D), unweighted; on request."""
    residual: Tensor | None = None
    """(T, D), the stream that the block's output is added to; on request."""


@contextmanager
def watched(
    layers: Sequence[MixtureLayer], take: Callable[[Seen], None], *, outputs: bool = False, residual: bool = False,
    model: nn.Module | None = None,
) -> Iterator[None]:  # fmt: skip
    """Hands every layer's `Seen` to `take`.

    outputs     also what each chosen expert put out, unweighted: costs K times the memory of the hidden states
    residual    also the stream before the block; needs the model
    """
    fired: set[str] = set()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(
                watch_layer(layer, take, fired, outputs, norm_before(model, layer) if residual else None)
            )
        yield
    refuse_unseen(layers, fired)


@contextmanager
def watch_layer(
    layer: MixtureLayer, take: Callable[[Seen], None], fired: set[str], outputs: bool, before: nn.Module | None
) -> Iterator[None]:
    held: dict[str, Any] = {}

    def routed(module: nn.Module, inputs: tuple[Any, ...], triple: tuple[Tensor, ...]) -> None:
        held["logits"] = triple[0]

    def entered(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        held["residual"] = inputs[0].reshape(-1, inputs[0].shape[-1])

    def capture(hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        held["outputs"] = slots = run_slots(layer, hidden_states, selected)
        summed: Tensor = (weights.to(slots.dtype)[..., None] * slots).sum(1)
        return summed.to(hidden_states.dtype)

    def done(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        fired.add(layer.name)
        hidden_states, selected, weights = inputs
        triple = Triple(held.pop("logits"), weights, selected)
        take(Seen(layer, triple, hidden_states, output, held.pop("outputs", None), held.pop("residual", None)))

    hooks = [layer.router.register_forward_hook(routed), layer.experts.register_forward_hook(done)]
    if before is not None:
        hooks.append(before.register_forward_pre_hook(entered))
    before_us = vars(layer.experts).get("forward")  # of an outer watch, or of accelerate
    if outputs:
        layer.experts.forward = capture
    try:
        yield
    finally:
        if outputs:
            del layer.experts.forward
            if before_us is not None:
                layer.experts.forward = before_us
        for hook in hooks:
            hook.remove()


def norm_before(model: nn.Module | None, layer: MixtureLayer) -> nn.Module:
    """The module whose input is the residual stream that the block adds to."""
    assert model is not None, "the residual stream is found from the model"
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    children = dict(parent.named_children())
    if "post_feedforward_layernorm" in children and "pre_feedforward_layernorm" not in children:
        return layer.block  # the norm comes after the block: the stream itself goes in
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm"):
        if name in children:
            return children[name]
    raise AnabranchError(
        f"the stream before {layer.name} was not found", expected="a norm of a known name", received=sorted(children)
    )


def norm_after(model: nn.Module, layer: MixtureLayer) -> nn.Module | None:
    """What the block's output goes through before it is added to the stream; None where it is added as it is."""
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    return dict(parent.named_children()).get("post_feedforward_layernorm")


@contextmanager
def changed(layers: Sequence[MixtureLayer], change: Change) -> Iterator[None]:
    """Every router's decision goes through `change`; contexts nest, the first entered acts first."""
    fired: set[str] = set()

    def hook_of(layer: MixtureLayer) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            fired.add(layer.name)
            return tuple(change(layer, Triple(*output)))

        return hook

    hooks = [layer.router.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    refuse_unseen(layers, fired)


def refuse_unseen(layers: Sequence[MixtureLayer], fired: set[str]) -> None:
    if missing := [layer.name for layer in layers if layer.name not in fired]:
        raise AnabranchError(
            f"{len(missing)} of {len(layers)} mixture layers never ran", expected="a forward pass inside the `with`",
            received=f"the first that did not run is {missing[0]}",
        )  # fmt: skip


# what can be done to a decision


def weight_of(triple: Triple, chosen: Tensor) -> Tensor:
    """(T, K) bool: the slots that hold one of the experts marked in `chosen` (N,)."""
    return chosen.to(triple.selected_experts.device)[triple.selected_experts]


def off_empty(triple: Triple, off: Tensor, *, keep_sum: bool = False) -> Triple:
    """Switched off with the slot left empty: weight 0, nobody moves up.

    off         (N,) bool
    keep_sum    the remaining weights are scaled to the former sum of the token
    """
    return scaled(triple, off, 0.0, keep_sum=keep_sum)


def scaled(triple: Triple, chosen: Tensor, factor: float, *, keep_sum: bool = False) -> Triple:
    """Weights of the chosen experts times `factor`, where they are selected anyway; others are left bit by bit."""
    mine_TK = weight_of(triple, chosen)
    weights_TK = torch.where(mine_TK, triple.routing_weights * factor, triple.routing_weights)
    if keep_sum:
        before_T1, after_T1 = triple.routing_weights.sum(-1, keepdim=True), weights_TK.sum(-1, keepdim=True)
        touched_T1 = mine_TK.any(-1, keepdim=True) & (after_T1 > 0)
        ratio_T1 = before_T1 / after_T1.clamp(min=torch.finfo(after_T1.dtype).tiny)
        weights_TK = torch.where(touched_T1, weights_TK * ratio_T1, weights_TK)
    return triple._replace(routing_weights=weights_TK)


def off_refill(layer: MixtureLayer, triple: Triple, off: Tensor) -> Triple:
    """Switched off so that the next expert moves up and the family weighs anew: what a model without them would do."""
    return layer.rescore(triple.router_logits, off)


def biased(layer: MixtureLayer, triple: Triple, bias: Tensor) -> Triple:
    """`bias` (N,) added to the logits; selection and weights follow."""
    return layer.rescore(triple.router_logits + bias.to(triple.router_logits))


def forced(layer: MixtureLayer, triple: Triple, promoted: Tensor, suppressed: Tensor, margin: float = 0.01) -> Triple:
    """Promoted experts above all others of the token, suppressed ones below: both (N,) bool.

    By the logits themselves: for a softmax that is the same as by its logarithm, for sigmoid gates that would move all.

    Limits by group stay: where promoted experts are in more groups than a token may use, those of some are left out.
    """
    if not bool(promoted.any() | suppressed.any()):
        return triple
    moved_TN = triple.router_logits.float()
    high_T1, low_T1 = moved_TN.amax(-1, keepdim=True) + margin, moved_TN.amin(-1, keepdim=True) - margin
    promoted, suppressed = promoted.to(moved_TN.device), suppressed.to(moved_TN.device)
    moved_TN = torch.where(promoted, high_T1, torch.where(suppressed, low_T1, moved_TN))
    rescored = layer.rescore(moved_TN, first=promoted, last=suppressed)  # half precision would lose the margin
    return rescored._replace(router_logits=moved_TN.to(triple.router_logits.dtype))
