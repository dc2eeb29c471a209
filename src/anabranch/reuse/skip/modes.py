# SPDX-License-Identifier: Apache-2.0
"""MoDES: pass over experts whose weight, times what their layer matters, is below the threshold of the token's class.

Paper     : arXiv 2511.15690 (CVPR 2026).
Equation  : alpha_l = mean_t KL(p || p with the routed experts of layer l off), over the sum of all layers
            slot i of token t off in layer l where alpha_l g_ti < tau_class(t)
            (tau_0, tau_1) = argmin of mean_t KL(p || p with skipping), subject to a share of skipped slots >= rho
Shapes    : T tokens, L layers, K chosen per token, V vocabulary; two classes of tokens, D thresholds tried of each.
Differs   : classes are any two kinds of token; one class has one threshold. The remaining weights are scaled to the
            token's former sum on request (`keep_sum`); whether the paper does so is unknown.
Check     : thresholds of 0 are the model itself; the frontier finds what the full grid finds, in 2 D runs at most
            (tests/reuse/skip/test_modes.py).

The frontier is exact where the share and the divergence only grow with each threshold. They do in one layer; later
layers see changed inputs, so in a whole model they do nearly.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer, Triple, mixture_layers
from anabranch.models.mixtures.routing import changed
from anabranch.reuse.calibration import Batch, captured, reading, real_tokens, refuse_empty, run
from anabranch.reuse.skip.slots import Skipped, without

CLASSES = "classes"
"""In a batch, (B, S) int64 of 0 and 1; without it all tokens are of class 0."""


def divergence(logits: Tensor, changed_logits: Tensor, real: Tensor) -> tuple[float, int]:
    """Sum over real tokens of KL(p || q), and their number."""
    p, q = (value.flatten(0, -2)[real].double().log_softmax(-1) for value in (logits, changed_logits))
    return float((p.exp() * (p - q)).sum()), int(real.sum())


@contextmanager
def knocked_out(layer: MixtureLayer) -> Iterator[None]:
    """All routed experts of a layer at weight 0; shared ones stay."""

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        return triple._replace(routing_weights=torch.zeros_like(triple.routing_weights))

    with changed([layer], change):
        yield


def layer_weights(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """alpha_l by name, which sum to 1; all 0 where no layer makes a difference. L + 1 passes over the text."""
    layers = mixture_layers(model)
    sums, tokens = dict.fromkeys((layer.name for layer in layers), 0.0), 0
    with reading(model):
        for batch in batches:
            real_T, plain = real_tokens(batch), run(model, batch)
            tokens += int(real_T.sum())
            for layer in layers:
                with knocked_out(layer):
                    sums[layer.name] += max(divergence(plain, run(model, batch), real_T)[0], 0.0)
    refuse_empty(tokens)
    total = sum(sums.values())
    return {name: value / total if total > 0 else 0.0 for name, value in sums.items()}


@contextmanager
def skipping(
    layers: Sequence[MixtureLayer], alpha: Mapping[str, float], taus: tuple[float, float],
    classes: Tensor | None = None, attention_mask: Tensor | None = None, *, keep_sum: bool = False,
) -> Iterator[Skipped]:  # fmt: skip
    """Around forward passes; classes and mask are those of one pass. Says how many slots were skipped."""
    if missing := [layer.name for layer in layers if layer.name not in alpha]:
        raise UsageError("alpha does not name every layer", expected=f"also {missing[0]}", received=sorted(alpha)[:3])
    if not all(tau >= 0 for tau in taus):
        raise UsageError("no thresholds", expected="two numbers >= 0", received=taus)
    skipped = Skipped()

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        scores_TK = alpha[layer.name] * triple.routing_weights.double()
        tau_C = scores_TK.new_tensor(taus)
        skip_TK = scores_TK < tau_C[class_of(layer, scores_TK, classes)][:, None]
        skipped.add(layer, skip_TK, attention_mask)
        return without(triple, skip_TK, keep_sum=keep_sum) if bool(skip_TK.any()) else triple

    with changed(layers, change):
        yield skipped


def class_of(layer: MixtureLayer, scores_TK: Tensor, classes: Tensor | None) -> Tensor:
    if classes is None:
        return torch.zeros(len(scores_TK), dtype=torch.int64, device=scores_TK.device)
    if classes.numel() != len(scores_TK) or not bool(((classes == 0) | (classes == 1)).all()):
        raise UsageError(
            f"the classes are not of the tokens that {layer.name} got", expected=f"{len(scores_TK)} of 0 and 1",
            received=f"{classes.numel()}, {sorted(set(classes.flatten().tolist()))[:4]}",
        )  # fmt: skip
    return classes.reshape(-1).to(scores_TK.device)


# the search


@dataclass(frozen=True)
class Found:
    taus: tuple[float, float]
    divergence: float
    share: float
    """Of all slots, skipped."""
    runs: int
    """How many pairs were tried."""


Evaluate = Callable[[float, float], tuple[float, float]]
"""Two thresholds to (divergence, share)."""


def frontier(evaluate: Evaluate, first: Sequence[float], second: Sequence[float], rho: float) -> Found:
    """The least divergence at a share >= rho: down from the corner (lowest, highest) along the edge of what suffices.

    first, second   thresholds to try, in rising order
    """
    check_rising(first, second, rho)
    i, j, runs, best = 0, len(second) - 1, 0, None
    while i < len(first) and j >= 0:
        distance, share = evaluate(first[i], second[j])
        runs += 1
        if share < rho:
            i += 1
            continue
        if best is None or distance < best.divergence:
            best = Found((first[i], second[j]), distance, share, 0)
        j -= 1
    if best is None:
        raise UsageError(
            "no pair of these thresholds skips enough", expected=f"a share of {rho}", received=f"{share} at most",
            hint="try higher thresholds",
        )  # fmt: skip
    return Found(best.taus, best.divergence, best.share, runs)


def candidates(model: Any, batches: Sequence[Batch], alpha: Mapping[str, float], count: int) -> tuple[list[float], ...]:
    """Thresholds to try, by class: 0, `count` values that split its scores evenly, and one that skips every slot."""
    layers = mixture_layers(model)
    seen = captured(model, layers, batches)
    class_T = torch.cat([of_batch(batch).reshape(-1)[real_tokens(batch)] for batch in batches])
    scores_TL = torch.cat([alpha[layer.name] * seen[layer.name].routing_weights.double() for layer in layers], 1)
    made = []
    for kind in (0, 1):
        own = scores_TL[class_T == kind].flatten()
        parts = torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1].to(own.device)
        between = own.quantile(parts, interpolation="higher").tolist() if len(own) else []
        made.append(sorted({0.0, *between, math.inf}) if len(own) else [0.0])
    return tuple(made)


def of_batch(batch: Batch) -> Tensor:
    return batch.get(CLASSES, torch.zeros_like(batch["input_ids"]))


def search(
    model: Any, batches: Sequence[Batch], alpha: Mapping[str, float], rho: float, *, count: int = 10,
    keep_sum: bool = False,
) -> Found:  # fmt: skip
    """The pair of thresholds for this model: at most 2 `count` + 5 passes over the text."""
    layers = mixture_layers(model)
    first, second = candidates(model, batches, alpha, count)
    with reading(model):
        plain = [run(model, batch) for batch in batches]
        return frontier(evaluator(model, layers, batches, alpha, plain, keep_sum), first, second, rho)


def evaluator(
    model: Any, layers: Sequence[MixtureLayer], batches: Sequence[Batch], alpha: Mapping[str, float],
    plain: Sequence[Tensor], keep_sum: bool,
) -> Evaluate:  # fmt: skip
    def evaluate(first: float, second: float) -> tuple[float, float]:
        distance, tokens, skipped = 0.0, 0, Skipped()
        for batch, logits in zip(batches, plain, strict=True):
            mask = batch.get("attention_mask")
            with skipping(layers, alpha, (first, second), of_batch(batch), mask, keep_sum=keep_sum) as own:
                found, count = divergence(logits, run(model, batch), real_tokens(batch))
            distance, tokens = distance + found, tokens + count
            skipped.skipped.update(own.skipped)
            skipped.slots.update(own.slots)
        return distance / max(tokens, 1), skipped.share()

    return evaluate


def check_rising(first: Sequence[float], second: Sequence[float], rho: float) -> None:
    if not 0 <= rho <= 1:
        raise UsageError("rho is no share", expected="0 to 1", received=rho)
    for values in (first, second):
        if not len(values) or any(a >= b for a, b in pairwise(values)):
            raise UsageError("thresholds have to rise", expected="at least one, each above the last", received=values)
