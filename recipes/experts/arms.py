# SPDX-License-Identifier: Apache-2.0
"""The arms of the comparison: what each method does to a trained mixture, and what every text loses by it.

Each returns its changes by domain on a bench.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS
from anabranch.jobs.experts.merge import CONTROLS, at_random, usage_of
from anabranch.jobs.experts.rank import highest
from anabranch.models.mixtures.layers import MixtureLayer
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
from recipes.experts.bench import Bench, Change

NUM_OFF, KEEP = 4, 4


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
            "ftri off, 4 experts": ftri.recipe(of("ftri"), names, num=4, top_k=2),
            "ftri on, 2": ftri.recipe(of("ftri"), names, num=2, turn="on", top_k=2),
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
