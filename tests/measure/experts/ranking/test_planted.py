# SPDX-License-Identifier: Apache-2.0
"""Whatever is planted, every ranking finds; where nothing is, none does."""

import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

from anabranch.measure.experts import ranking
from anabranch.measure.experts.ranking.batches import read_stats
from tests.measure.experts.planted import FOLDS, LABELS, OTHER, OWN, place, world

PLAIN = {"routing", "outputs", "residual"}
MODULES = {
    path.stem: import_module(f"{ranking.__name__}.{path.stem}")
    for path in sorted(Path(ranking.__file__).parent.glob("*.py"))
    if path.stem != "__init__"
}
RANKINGS = {name: module for name, module in MODULES.items() if hasattr(module, "rank")}
OWN_WORLDS = {"dsmoe", "router_lens"}
"""What they look for is another thing; their own tests plant it."""
CLAIMS = sorted(set(RANKINGS) - OWN_WORLDS - {"random"})


@cache
def plain(seed, planted, family):
    made = world(seed, planted, family)
    return made, read_stats(made.model, made.batches, LABELS, num_folds=FOLDS, outputs=True, residual=True)


@cache
def places(name, seeds, planted, family="OLMoE"):
    module, found = RANKINGS[name], []
    for seed in range(seeds):
        made, stats = plain(seed, planted, family)
        if not set(module.NEEDS) <= PLAIN:
            stats = module.collect(made.model, made.batches, LABELS, num_folds=FOLDS)
        found.append(place(module.rank(stats, OWN, (OTHER,)), made))
    return found


@pytest.mark.parametrize("family", ["OLMoE", "Qwen3-MoE", "GptOss"])
@pytest.mark.parametrize("name", CLAIMS)
def test_the_planted_expert_is_first(name, family):
    assert places(name, 4, True, family) == [0.0] * 4


@pytest.mark.parametrize("name", CLAIMS)
def test_in_the_control_it_is_at_chance(name):
    found = places(name, 20, False)
    assert 0.3 < sum(found) / 20 < 0.7  # deviation of the mean at chance: 0.065
    assert found.count(0.0) <= 3  # 0.8 expected


def test_random_experts_find_nothing():
    for planted in (True, False):
        found = places("random", 20, planted)
        assert 0.3 < sum(found) / 20 < 0.7
        assert found.count(0.0) <= 3


@pytest.mark.parametrize("name", sorted(RANKINGS))
def test_every_ranking_has_the_interface(name):
    module = RANKINGS[name]
    assert list(inspect.signature(module.rank).parameters)[:3] == ["stats", "target", "others"]
    _, stats = plain(0, True, "OLMoE")
    if set(module.NEEDS) <= PLAIN:
        scores = module.rank(stats, OWN, (OTHER,))
        assert scores.shape == (len(stats.layers), stats.num_experts)
        assert scores.dtype == torch.float64
        assert bool(scores.isfinite().all())
    else:
        assert hasattr(module, "collect"), "a ranking that needs more than the plain sums collects it"
