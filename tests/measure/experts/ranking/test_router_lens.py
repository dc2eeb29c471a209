# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.ranking import router_lens
from anabranch.measure.experts.ranking.batches import read_stats
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from tests.measure.experts.handmade import handmade
from tests.measure.experts.planted import FOLDS, copier, place, world

SEEDS = range(16)


def lens(made, **options):
    settings = {"epochs": 20, "learning_rate": 1e-2, "num_folds": FOLDS} | options
    return router_lens.collect(made.model, made.batches, ["copy"], **settings)


@pytest.fixture(scope="module")
def places():
    """(planted, tuned) to the places of the copying expert, a seed each."""
    found = {(planted, tuned): [] for planted in (True, False) for tuned in (True, False)}
    for planted in (True, False):
        for seed in SEEDS:
            made = copier(seed, planted)
            stats = lens(made).stats
            found[planted, True].append(place(router_lens.rank(stats, "copy"), made))
            found[planted, False].append(place(router_lens.untuned(stats, "copy"), made))
    return found


def test_after_tuning_the_expert_that_copies_is_first(places):
    assert places[True, True] == [0.0] * len(SEEDS)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_untuned_or_with_nobody_copying_it_is_at_chance(places, which):
    assert 0.25 < sum(places[which]) / len(SEEDS) < 0.75  # deviation of the mean at chance: 0.08
    assert places[which].count(0.0) <= 6  # 2 expected


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3", "GptOss"])
def test_only_the_copys_routers_change_and_the_model_is_left_alone(family):
    made = world(0, family=family)
    batches = [replace(batch, answers=batch.attention_mask.bool()) for batch in made.batches]
    for parameter in made.model.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    found = router_lens.collect(made.model, batches, ["a", "b"], learning_rate=1e-2)
    after = made.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    routers = {
        f"{layer.name}.{layer.router_name}.{name}"
        for layer in open_layers(made.model)
        for name, _ in layer.router.named_parameters()
    }
    tuned = found.model.state_dict()
    assert {name for name in before if not torch.equal(tuned[name], before[name])} == routers
    shared = {value.data_ptr() for value in made.model.parameters()}
    assert sum(value.data_ptr() not in shared for value in found.model.parameters()) == len(routers)
    assert found.unmoved == ()


def test_the_control_is_the_plain_frequency_and_both_cover_the_same_tokens():
    made = copier(0)
    found = lens(made, epochs=2)
    plain = read_stats(made.model, made.batches, ["copy"], num_folds=FOLDS)
    assert torch.equal(found.stats["count"], plain["count"])
    assert float(found.stats.of("tuned_count", "copy").sum()) == float(plain.of("count", "copy").sum())
    again = read_stats(found.model, made.batches, ["copy"], num_folds=FOLDS)
    assert torch.equal(found.stats["tuned_count"], again["count"])


def test_the_loss_is_of_the_answers_alone_and_falls():
    made = copier(1)
    batch = made.batches[0]
    with torch.no_grad():
        logs = made.model(batch.input_ids).logits.log_softmax(-1)
    expected = -sum(float(logs[b, -2, batch.input_ids[b, -1]]) for b in range(len(logs))) / len(logs)
    losses = lens(made).losses
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [router_lens.rate_at(step, 20, 0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 18)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_layer_whose_router_has_no_gradient_is_named():
    made = world(0)
    batches = [replace(batch, answers=batch.attention_mask.bool()) for batch in made.batches]
    first, *others = open_layers(made.model)
    with torch.no_grad():
        first.experts.down_proj.zero_()  # whichever expert it chooses, nothing follows
    assert router_lens.collect(made.model, batches, ["a", "b"], epochs=1).unmoved == (first.name,)
    with torch.no_grad():
        for layer in others:
            layer.experts.down_proj.zero_()
    with pytest.raises(AnabranchError, match="tuning moved no router"):
        router_lens.collect(made.model, batches, ["a", "b"], epochs=1)


def test_batches_have_to_say_what_the_answers_are():
    model, batches = tiny("OLMoE"), world(0).batches
    with pytest.raises(UsageError, match=r"tuned on answers[\s\S]*none marked"):
        router_lens.collect(model, batches, ["a", "b"])
    with pytest.raises(UsageError, match=r"hold no 'tuned_count'"):
        router_lens.rank(handmade({"a": 1}, count={"a": [[1]]}), "a")
