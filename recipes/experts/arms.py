# SPDX-License-Identifier: Apache-2.0
"""The arms of the comparison: what each method does to a trained mixture, and what every text loses by it.

A bench is one model, one target domain and one draw of the texts that scores are computed from; losses are always on
the same unseen windows. An arm returns its changes by domain in nats a byte, and what it cost.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS
from anabranch.data.streams import derived_seed
from anabranch.jobs.experts_merge import CONTROLS, at_random, usage_of
from anabranch.jobs.experts_profile import Everything
from anabranch.jobs.experts_rank import highest
from anabranch.jobs.experts_texts import Windows, losses_of
from anabranch.measure.experts.ranking import dsmoe, router_lens
from anabranch.measure.experts.ranking.batches import Batch, read
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.models.mixtures.routing import changed, off_refill
from anabranch.reuse.merge import mc_smoe, sub_moe
from anabranch.reuse.prune import naee, premoe
from anabranch.reuse.prune.keep import masked, random_keep, uniform
from anabranch.reuse.skip import modes
from anabranch.reuse.skip import naee as skip_naee
from anabranch.reuse.skip.slots import without
from anabranch.reuse.steer import dsmoe as steer_dsmoe
from anabranch.reuse.steer import ftri, rice, steermoe
from anabranch.reuse.steer.recipe import Recipe

NUM_OFF, KEEP, BATCH = 4, 4, 24
Change = dict[str, float]


@dataclass
class Bench:
    """One model, one target, one draw."""

    name: str
    model: Any
    target: str
    draw: int
    read_: dict[str, Windows]
    """What scores are computed from, by domain."""
    asked: dict[str, Windows]
    layers: list[MixtureLayer] = field(init=False)
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = open_layers(self.model)
        self.before = self.losses()

    def losses(self, model: Any = None) -> dict[str, Tensor]:
        return {name: losses_of(model or self.model, windows) for name, windows in self.asked.items()}

    def change(self, model: Any = None) -> Change:
        after = self.losses(model)
        return {name: float((after[name] - self.before[name]).mean()) for name in after}

    def within(self, context: AbstractContextManager[Any]) -> Change:
        with context:
            return self.change()

    @property
    def others(self) -> list[str]:
        return [name for name in DOMAINS if name != self.target]

    def batches(self, labels: Sequence[str]) -> list[Batch]:
        """Every domain's own label is its place in `labels`; those of no label are left out."""
        found = []
        for label, name in enumerate(labels):
            windows = self.read_[name]
            folds = windows.folds(10)
            for start in range(0, len(folds), BATCH):
                ids, mask = windows.input_ids[start : start + BATCH], windows.attention_mask[start : start + BATCH]
                rows = folds[start : start + BATCH]
                found.append(Batch(ids, mask, torch.full_like(ids, label), rows, answers=mask.bool()))
        return found

    def plain(self, labels: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in self.batches(labels)]

    def seed(self) -> torch.Generator:
        """Of this bench's own controls: other draws for every model, target and draw."""
        return torch.Generator().manual_seed(derived_seed("control", self.name, self.target, self.draw))


def statistics(bench: Bench) -> tuple[ExpertStats, dict[str, float]]:
    """All sums of one pass over every domain; seconds of a plain pass, of one with routing, of one with outputs too."""
    seconds = {}
    started = time.perf_counter()
    with torch.no_grad():
        for batch in bench.batches(DOMAINS):
            bench.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    seconds["forward"] = time.perf_counter() - started
    for name, outputs in (("routing", False), ("outputs", True)):
        started = time.perf_counter()
        collector = Everything(bench.model, bench.layers, DOMAINS, outputs=outputs, residual=outputs)
        stats = read(collector, bench.batches(DOMAINS))
        seconds[name] = time.perf_counter() - started
    return stats, seconds


def with_gradients(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """Rankings that need more than a pass."""

    def by_dsmoe() -> Tensor:
        stats = dsmoe.collect(bench.model, bench.batches([bench.target]))
        return dsmoe.rank(stats)

    def by_router_lens() -> Tensor:
        lens = router_lens.collect(
            bench.model, bench.batches([bench.target]), [bench.target], epochs=2, learning_rate=5e-3
        )
        return router_lens.rank(lens.stats, bench.target)

    return {"dsmoe": by_dsmoe, "router_lens": by_router_lens}


def off(bench: Bench, scores: Tensor) -> Change:
    """The highest experts of the whole model switched off, the next ones move up."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for layer, expert in highest(scores, NUM_OFF):
        mask[layer, expert] = True
    place = {layer.name: i for i, layer in enumerate(bench.layers)}
    hit = [layer for layer in bench.layers if mask[place[layer.name]].any()]
    return bench.within(changed(hit, lambda own, triple: off_refill(own, triple, mask[place[own.name]])))


def prunings(bench: Bench, scores: dict[str, Tensor]) -> dict[str, Callable[[], Change]]:
    arms: dict[str, Callable[[], Change]] = {
        name: lambda own=own: bench.within(masked(bench.layers, uniform(bench.layers, own, KEEP)))
        for name, own in scores.items() if name != "random"
    }  # fmt: skip
    arms["naee"] = lambda: bench.within(
        masked(bench.layers, naee.search(bench.model, bench.plain([bench.target]), KEEP).keep)
    )

    def drawn() -> Change:
        generator = bench.seed()
        draws = [
            bench.within(masked(bench.layers, random_keep(bench.layers, KEEP, generator))) for _ in range(CONTROLS)
        ]
        return {name: sum(draw[name] for draw in draws) / CONTROLS for name in DOMAINS}

    arms["random"] = drawn
    return arms


def by_premoe(bench: Bench, scores: dict[str, Tensor]) -> tuple[Change, str]:
    """The library of all six domains, asked with an unseen text of the target; which task it found."""
    library = premoe.TaskLibrary.of(bench.layers, scores)
    asked = bench.asked[bench.target]
    logits = premoe.first_layer(bench.model, bench.layers[0], {"input_ids": asked.input_ids[:8]})
    best = logits.amax(-1, keepdim=True)
    pattern = torch.where(logits == best, logits, torch.zeros_like(logits)).double().mean(0)
    return bench.within(masked(bench.layers, library.keep(bench.layers, pattern, KEEP))), library.retrieve(pattern)


def mergings(bench: Bench) -> dict[str, Callable[[], Change]]:
    text = bench.plain([bench.target])

    def merged(how: Callable[[Any], Any]) -> Change:
        model = copy.deepcopy(bench.model)
        how(model)
        return bench.change(model)

    def by_mc_smoe(model: Any) -> Any:
        return mc_smoe.merge(model, text, KEEP * len(bench.layers))

    def by_sub_moe(model: Any, rank: int | None = None) -> Any:
        return sub_moe.merge(model, text, KEEP, rank=rank, seed=bench.draw)

    usage, generator = usage_of(bench.model, text), bench.seed()

    def control(by: str, method: Callable[[Any], Any]) -> Change:
        labels = method(copy.deepcopy(bench.model)).labels
        draws = [merged(lambda model: at_random(model, by, labels, usage, generator)) for _ in range(CONTROLS)]
        return {name: sum(draw[name] for draw in draws) / CONTROLS for name in DOMAINS}

    return {
        "mc_smoe": lambda: merged(by_mc_smoe),
        "mc_smoe: random groups": lambda: control("mc_smoe", by_mc_smoe),
        "sub_moe": lambda: merged(by_sub_moe),
        "sub_moe, rank 96": lambda: merged(lambda model: by_sub_moe(model, 96)),
        "sub_moe: random groups": lambda: control("sub_moe", by_sub_moe),
    }


def steerings(bench: Bench, scores: dict[str, Tensor]) -> dict[str, Callable[[], Change]]:
    names = [layer.name for layer in bench.layers]
    drawn = torch.rand(scores["ftri"].shape, generator=bench.seed())

    def recipes(of: Callable[[str], Tensor]) -> dict[str, Recipe]:
        return {
            "ftri off, 4 experts": ftri.recipe(of("ftri"), names, num=4),
            "ftri on, 2": ftri.recipe(of("ftri"), names, num=2, turn="on"),
            "rice, beta 2, 2": rice.recipe(of("rice"), names, num=2, beta=2.0),
            "dsmoe, alpha 2, 2": steer_dsmoe.recipe(of("dsmoe"), names, num=2, alpha=2.0),
            "steermoe, promote 2": steermoe.recipe(of("steermoe"), names, promote=2, top_k=2),
            "steermoe, suppress 4": steermoe.recipe(-of("steermoe"), names, suppress=4, top_k=2),
        }

    arms = {}
    for control, made in ((False, recipes(scores.__getitem__)), (True, recipes(lambda name: drawn))):
        for name, recipe in made.items():
            key = f"{name}: random experts" if control else name
            arms[key] = lambda recipe=recipe: bench.within(recipe.applied(bench.layers))
    return arms


def skippings(bench: Bench) -> dict[str, Callable[[], tuple[Change, float]]]:
    """With the share of slots that were skipped."""
    text = bench.plain([bench.target])

    def by_naee() -> tuple[Change, float]:
        with skip_naee.skipping(bench.layers, skip_naee.calibrate(bench.model, text)) as skipped:
            return bench.change(), skipped.share()

    def by_modes() -> tuple[Change, float]:
        alpha = modes.layer_weights(bench.model, text)
        found = modes.search(bench.model, text, alpha, 0.25, keep_sum=True)
        with modes.skipping(bench.layers, alpha, found.taus, keep_sum=True) as skipped:
            return bench.change(), skipped.share()

    def at_random() -> tuple[Change, float]:
        generator = bench.seed()

        def change(layer: MixtureLayer, triple: Any) -> Any:
            skip_TK = torch.zeros_like(triple.routing_weights, dtype=torch.bool)
            drawn_T = torch.rand(len(skip_TK), generator=generator)
            lesser_T = triple.routing_weights.argmin(-1)
            skip_TK[torch.arange(len(skip_TK)), lesser_T] = drawn_T < 0.5
            return without(triple, skip_TK, keep_sum=True)

        return bench.within(changed(bench.layers, change)), 0.25

    return {"naee": by_naee, "modes, a quarter": by_modes, "half of the second slots, drawn": at_random}
