# SPDX-License-Identifier: Apache-2.0
"""What a mixture-of-experts language model has to do under the bridge, operation by operation, on a model of yours.

    for operation, outcome in contract(model).items():
        print(operation, "passed" if outcome else outcome.why, outcome.difference)

Everything that changes the model is done to a copy; the model itself is left as it was, bit by bit.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.models.mixtures import routing
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import CORRECTION, MixtureLayer, Triple, open_layers
from anabranch.models.mixtures.routing import Seen, changed, watched
from anabranch.models.mixtures.surgery import keep_experts, permute_experts

BATCH, LENGTH = 2, 12
ROUNDING = 20
"""Times the spacing of the model's precision at 1: what two ways to the same sum may differ by, relative to the largest
value; 2.4e-6 in float32."""


@dataclass(frozen=True)
class Outcome:
    """True where it passed."""

    passed: bool
    difference: float
    """The largest one seen, relative to the largest value; of choices, how many were wrong."""
    why: str = ""

    def __bool__(self) -> bool:
        return self.passed


def contract(model: Any, *, seed: int = 0) -> dict[str, Outcome]:
    """Every operation of the bridge, tried on drawn tokens.

    found       routers and experts are where the bridge looks, and answer as it expects
    read        what is watched is what the router says, and watching changes nothing
    outputs     unweighted outputs of the chosen experts sum to the block's
    off         an expert switched off with its slot empty is one whose down-projection is zero
    refill      experts switched off with their slots refilled are experts cut out
    force       a promoted expert is in every token's choice, a suppressed one in none, and all is undone
    slice       a model with fewer experts is saved and loaded by transformers alone, bit by bit
    permute     another order of the experts is the same function
    save        the model itself is saved and loaded bit by bit
    """
    operations: dict[str, Callable[[Any, Tensor], tuple[float, float]]] = {
        "found": found, "read": read, "outputs": outputs, "off": off, "refill": refill, "force": force,
        "slice": slice_, "permute": permute, "save": save,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, model.config.get_text_config().vocab_size, (BATCH, LENGTH), generator=generator)
    results: dict[str, Outcome] = {}
    training = model.training
    model.eval()
    try:
        for name, operation in operations.items():
            results[name] = tried(operation, model, ids_BS.to(model.device))
    finally:
        model.train(training)
    return results


def tried(operation: Callable[[Any, Tensor], tuple[float, float]], model: Any, ids_BS: Tensor) -> Outcome:
    try:
        with torch.no_grad():
            difference, tolerance = operation(model, ids_BS)
    except (AnabranchError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return Outcome(False, math.nan, str(error))  # a family outside the contract fails in its own way
    passed = difference <= tolerance
    return Outcome(passed, difference, "" if passed else f"differs by {difference:.2g}, at most {tolerance:.2g}")


# the operations: the largest difference and what is allowed


def found(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    open_layers(model)
    return 0.0, 0.0


def read(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    layers, seen = open_layers(model), list[Seen]()
    plain = logits_of(model, ids_BS)
    with watched(layers, seen.append):
        differences = [distance(logits_of(model, ids_BS), plain)]
    for one in seen:
        logits, weights, selected = one.layer.router(one.hidden_states)
        differences += [distance(one.triple.router_logits, logits), distance(one.triple.routing_weights, weights)]
        differences.append(float((one.triple.selected_experts != selected).sum()))
    return max(differences), 0.0


def outputs(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    layers, seen, plain = open_layers(model), list[Seen](), list[Seen]()
    with watched(layers, seen.append, outputs=True):
        logits_of(model, ids_BS)
    with watched(layers, plain.append):
        logits_of(model, ids_BS)
    differences = []
    for one, reference in zip(seen, plain, strict=True):
        assert one.outputs is not None
        sum_TD = (one.triple.routing_weights.float()[..., None] * one.outputs.float()).sum(1)
        differences.append(distance(sum_TD, reference.layer.experts(*handed(one)).float()))
    return max(differences), tolerance(model)


def off(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    layers, emptied = open_layers(model), copy.deepcopy(model)
    for layer in open_layers(emptied):
        expert = ExpertBank(layer)[0]
        expert.down.zero_()
        if expert.down_bias is not None:
            expert.down_bias.zero_()
    with changed(layers, lambda layer, triple: routing.off_empty(triple, marked(layer, [0]))):
        return distance(logits_of(model, ids_BS), logits_of(emptied, ids_BS)), 0.0


def refill(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    layers, fewer = open_layers(model), copy.deepcopy(model)
    keep = {layer.name: kept(layer) for layer in layers}
    keep_experts(fewer, keep)
    without = {layer.name: ~marked(layer, keep[layer.name]) for layer in layers}
    with changed(layers, lambda layer, triple: routing.off_refill(layer, triple, without[layer.name])):
        return distance(logits_of(model, ids_BS), logits_of(fewer, ids_BS)), tolerance(model)


def force(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    layers, seen = open_layers(model), list[Triple]()
    plain = logits_of(model, ids_BS)
    last = layers[0].num_experts - 1

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        seen.append(routing.forced(layer, triple, marked(layer, [last]), marked(layer, [0])))
        return seen[-1]

    with changed(layers, change):
        logits_of(model, ids_BS)
    wrong = sum(int((one.selected_experts != last).all(-1).sum() + (one.selected_experts == 0).sum()) for one in seen)
    with changed(layers, lambda layer, triple: routing.forced(layer, triple, marked(layer, []), marked(layer, []))):
        identity = distance(logits_of(model, ids_BS), plain)
    return wrong + identity + distance(logits_of(model, ids_BS), plain), 0.0


def slice_(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    fewer = copy.deepcopy(model)
    keep_experts(fewer, {layer.name: kept(layer) for layer in open_layers(model)})
    return reloaded(fewer, ids_BS), 0.0


def permute(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    other = copy.deepcopy(model)
    for layer in open_layers(other):
        size = layer.num_experts // layer.num_groups
        permute_experts(layer, [e for group in range(layer.num_groups) for e in reversed(block(group, size))])
    open_layers(other)
    return distance(logits_of(other, ids_BS), logits_of(model, ids_BS)), tolerance(model)


def save(model: Any, ids_BS: Tensor) -> tuple[float, float]:
    return reloaded(model, ids_BS), 0.0


# what they share


def logits_of(model: Any, ids_BS: Tensor) -> Tensor:
    logits: Tensor = model(ids_BS, use_cache=False).logits
    return logits


def reloaded(model: Any, ids_BS: Tensor) -> float:
    """How far the model is from itself after transformers saved and loaded it, weights and logits."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        again = type(model).from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
        open_layers(again)
        saved, loaded = model.state_dict(), again.state_dict()
        unlike = sum(name not in loaded or not torch.equal(value, loaded[name]) for name, value in saved.items())
        computed = dict(again.named_buffers())
        for name, value in model.named_buffers():
            if name not in saved:  # tables of positions: made from the configuration, by `to` in lower precision
                computed[name].data = value.data
        return unlike + distance(logits_of(again, ids_BS), logits_of(model, ids_BS))


def handed(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    return seen.hidden_states, seen.triple.selected_experts, seen.triple.routing_weights


def marked(layer: MixtureLayer, experts: Sequence[int]) -> Tensor:
    """(N,) bool."""
    mark = torch.zeros(layer.num_experts, dtype=torch.bool, device=layer.router.weight.device)  # type: ignore[arg-type]
    mark[list(experts)] = True
    return mark


def block(group: int, size: int) -> range:
    return range(group * size, (group + 1) * size)


def kept(layer: MixtureLayer) -> list[int]:
    """All but the first of each group; but the first two where there is no third."""
    size = layer.num_experts // layer.num_groups
    least = max(2 if CORRECTION in layer.router._buffers else 1, -(-layer.top_k // layer.num_groups))
    start = 1 if size > least else 0
    return [e for group in range(layer.num_groups) for e in block(group, size)[start:]]


def distance(received: Tensor, expected: Tensor) -> float:
    """max |a - b|, relative to max |b| where that is above 1."""
    difference = float((received.float() - expected.float()).abs().max())
    return difference / max(float(expected.float().abs().max()), 1.0)


def tolerance(model: Any) -> float:
    return ROUNDING * torch.finfo(model.dtype).eps
