# SPDX-License-Identifier: Apache-2.0
"""Router Lens: the experts that routers choose once they alone were tuned to answer from the context.

Paper     : Router Lens (arXiv 2508.19594).
Equation  : tuned routers = argmin of the loss of the answer tokens, all else fixed;  r_e = sum_t a_te / T under them
Shapes    : L layers, N experts, T tokens.
Differs   : the routers' own parameters are trained, not low-rank additions to them: they are small, and most families'
            routers are no linear layers. Every document counts the same in the loss; no balance loss, as there.
Check     : the one expert that copies a key is first after tuning and at chance before
            (tests/measure/experts/ranking/test_router_lens.py).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.ranking import frequency
from anabranch.measure.experts.ranking.batches import Batch, next_token_losses, read
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import MixtureLayer, evaluating, open_layers

SUM = "tuned_count"
NEEDS = (SUM,)


@dataclass(frozen=True, eq=False)
class Lens:
    stats: ExpertStats
    """Of the model as it came, and beside them how often the tuned routers choose an expert."""
    losses: tuple[float, ...]
    """Of every step of the tuning."""
    model: Any
    """The copy whose routers were tuned; all other parameters are the model's own."""
    unmoved: tuple[str, ...]
    """Layers whose routers had no gradient, so that their ranking is the untuned one."""


def with_own_routers(model: Any) -> tuple[Any, list[nn.Parameter]]:
    """A copy that shares every parameter but the routers', and these."""
    own = {id(value) for layer in open_layers(model) for value in layer.router.parameters()}
    memo: dict[int, Any] = {id(value): value for value in model.parameters() if id(value) not in own}
    tuned = copy.deepcopy(model, memo)
    routers = [value for layer in open_layers(tuned) for value in layer.router.parameters()]
    for value in routers:
        value.requires_grad_()
    return tuned, routers


def weight_of(layer: MixtureLayer) -> Tensor:
    return torch.cat([value.detach().flatten() for value in layer.router.parameters()])


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate: up in a straight line, down along a cosine."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def tune(
    model: Any, routers: list[nn.Parameter], batches: Sequence[Batch], epochs: int, learning_rate: float, warmup: float
) -> list[float]:
    """The loss of every step; only the routers are changed."""
    optimizer = torch.optim.AdamW(routers, lr=learning_rate, weight_decay=0.0)
    steps, losses = epochs * len(batches), list[float]()
    with evaluating(model), torch.enable_grad():
        for step in range(steps):
            batch = batches[step % len(batches)].to(routers[0].device)
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            loss = next_token_losses(out.logits, batch).mean()
            # a router of a layer that the answers do not depend on has no gradient
            slopes = torch.autograd.grad(loss, routers, allow_unused=True)
            for router, slope in zip(routers, slopes, strict=True):
                router.grad = slope
            optimizer.param_groups[0]["lr"] = learning_rate * rate_at(step, steps, warmup)
            optimizer.step()
            losses.append(loss.item())
    for router in routers:
        router.grad = None
    return losses


def collect(
    model: Any, batches: Sequence[Batch], labels: Sequence[str], *, epochs: int = 3, learning_rate: float = 5e-4,
    warmup: float = 0.1, num_folds: int = 10, fingerprint: str = "",
) -> Lens:  # fmt: skip
    """Tunes a copy's routers on the answers, then counts what they choose on the same documents.

    batches     prompts with their answers, in the order that they are trained in; each says which tokens are answers

    Raises:
        UsageError: a batch does not say which tokens are answers.
        AnabranchError: no router had a gradient.
    """
    if not batches or any(batch.answers is None or not batch.answers.any() for batch in batches):
        raise UsageError("the routers are tuned on answers", expected="batches that mark them", received="none marked")
    tuned, routers = with_own_routers(model)
    losses = tune(tuned, routers, batches, epochs, learning_rate, warmup)
    layers, moved = open_layers(model), open_layers(tuned)
    unmoved = tuple(a.name for a, b in zip(layers, moved, strict=True) if torch.equal(weight_of(a), weight_of(b)))
    if len(unmoved) == len(layers):
        raise AnabranchError("tuning moved no router", expected="a gradient of the answers' loss", received="none")
    stats = read(Collector(model, layers, labels, num_folds=num_folds, fingerprint=fingerprint), batches)
    stats.add(SUM, read(Collector(tuned, moved, labels, num_folds=num_folds), batches)["count"])
    return Lens(stats, tuple(losses), tuned, unmoved)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of(SUM, target) / max(stats.num_tokens(target), 1)


def untuned(stats: ExpertStats, target: str) -> Tensor:
    """The control that ships with the ranking: the same of the model as it came."""
    return frequency.rank(stats, target)
