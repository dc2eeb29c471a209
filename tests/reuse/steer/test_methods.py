# SPDX-License-Identifier: Apache-2.0
"""Steering recipes: what each changes, what it leaves alone, what it refuses; saved, undone and baked."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.models.mixtures.routing import watched
from anabranch.reuse.steer import dsmoe, ftri, rice, steermoe
from anabranch.reuse.steer.choice import highest
from anabranch.reuse.steer.recipe import KINDS, WITH_AMOUNT, Recipe, Step

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def scored(layers, highest=(), lowest=()):
    scores = torch.zeros(len(layers), layers[0].num_experts)
    for rank, (layer, expert) in enumerate(highest):
        scores[layer, expert] = 10 - rank
    for rank, (layer, expert) in enumerate(lowest):
        scores[layer, expert] = rank - 10
    return scores, [layer.name for layer in layers]


@torch.no_grad()
def passed(model, layers, recipe=None):
    """Logits, and the triples as the experts received them."""
    seen = []
    with watched(layers, seen.append):
        if recipe is None:
            return model(IDS).logits, [one.triple for one in seen]
        with recipe.applied(layers):
            return model(IDS).logits, [one.triple for one in seen]


@pytest.fixture(scope="module", params=["Qwen2-MoE", "DeepSeek-V3", "GptOss"])
def world(request):
    model = tiny(request.param)
    return model, open_layers(model)


def test_off_leaves_the_slot_empty_keeps_the_sum_and_touches_no_other_token(world):
    model, layers = world
    before, triples = passed(model, layers)
    last = layers[-1]
    expert = int(triples[-1].selected_experts.flatten().bincount().argmax())
    met = (triples[-1].selected_experts == expert).any(-1)
    assert 0 < met.sum() < len(met), "the world should have tokens of both sorts"
    scores, names = scored(layers, highest=[(len(layers) - 1, expert)])
    after, steered = passed(model, layers, ftri.recipe(scores, names, num=1, top_k=2))
    assert torch.equal(steered[-1].selected_experts, triples[-1].selected_experts)
    assert (steered[-1].routing_weights[steered[-1].selected_experts == expert] == 0).all()
    torch.testing.assert_close(steered[-1].routing_weights.sum(-1), triples[-1].routing_weights.sum(-1))
    assert torch.equal(after.flatten(0, 1)[~met], before.flatten(0, 1)[~met])
    assert not torch.isclose(after.flatten(0, 1)[met], before.flatten(0, 1)[met]).all(-1).any()
    again, _ = passed(model, layers)
    assert torch.equal(again, before), "undone, bit for bit"
    assert last.name == names[-1]


def test_rice_multiplies_where_the_expert_is_selected_anyway_and_beta_one_is_nothing(world):
    model, layers = world
    before, triples = passed(model, layers)
    expert = int(triples[0].selected_experts.flatten().bincount().argmax())
    scores, names = scored(layers, highest=[(0, expert), (0, (expert + 1) % 8)])
    assert torch.equal(passed(model, layers, rice.recipe(scores, names, beta=1.0))[0], before)
    _, steered = passed(model, layers, rice.recipe(scores, names, num=1, beta=4.0))
    mine = triples[0].selected_experts == expert
    assert torch.equal(steered[0].routing_weights[mine], 4 * triples[0].routing_weights[mine])
    assert torch.equal(steered[0].routing_weights[~mine], triples[0].routing_weights[~mine])


@pytest.mark.parametrize("alpha", [0.2, 3.0, 50.0])
def test_dsmoe_never_changes_a_tokens_sum_of_weights(world, alpha):
    model, layers = world
    before, triples = passed(model, layers)
    expert = int(triples[0].selected_experts.flatten().bincount().argmax())
    scores, names = scored(layers, highest=[(0, expert)])
    _, steered = passed(model, layers, dsmoe.recipe(scores, names, num=1, alpha=alpha))
    torch.testing.assert_close(steered[0].routing_weights.sum(-1), triples[0].routing_weights.sum(-1))
    mine, others = triples[0].selected_experts == expert, triples[0].selected_experts != expert
    ratio = steered[0].routing_weights / triples[0].routing_weights
    with_it = mine.any(-1)
    torch.testing.assert_close(ratio[mine], alpha * ratio[with_it][others[with_it]])  # it and its neighbour, K = 2
    assert torch.equal(passed(model, layers, dsmoe.recipe(scores, names, num=1, alpha=1.0))[0], before)


def test_steermoe_promotes_into_every_set_and_suppresses_from_all():
    for family in ("Mixtral", "Qwen2-MoE", "GptOss", "GraniteMoe"):
        model = tiny(family)
        layers = open_layers(model)
        scores, names = scored(layers, highest=[(0, 5), (1, 2)], lowest=[(0, 1), (2, 4)])
        _, steered = passed(model, layers, steermoe.recipe(scores, names, promote=2, suppress=2, top_k=2))
        assert (steered[0].selected_experts == 5).any(-1).all()
        assert (steered[1].selected_experts == 2).any(-1).all()
        assert not (steered[0].selected_experts == 1).any()
        assert not (steered[2].selected_experts == 4).any()


def test_steermoe_promotes_at_most_top_k_of_a_layer():
    scores = torch.tensor([[9.0, 8, 7, 6], [1, 0, 0, 0]])
    made = steermoe.recipe(scores, ["a", "b"], promote=3, top_k=2)
    assert made.steps[0].experts == (("a", 0), ("a", 1), ("b", 0))


def test_a_recipe_survives_its_file_and_says_what_it_cannot_do(tmp_path, world):
    _, layers = world
    names = [layer.name for layer in layers]
    steps = tuple(
        Step(kind=kind, experts=((names[0], i),), amount=0.5 if kind in WITH_AMOUNT else None)
        for i, kind in enumerate(KINDS)
    )
    made = Recipe(steps=steps, made_by="a test", model="abc")
    made.save(tmp_path / "steer.json")
    assert Recipe.load(tmp_path / "steer.json") == made
    with pytest.raises(UsageError, match="no checkpoint can say empty_keep_sum"):
        made.bake(layers)
    for text, says in (
        ("{", "cannot be read"), ("[]", "is no steering recipe"), ('{"format": "x"}', "is no steering recipe"),
        (json.dumps({"format": "anabranch steering recipe 1", "steps": []}), "is torn"),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=says):
            Recipe.load(tmp_path / "bad.json")


def test_what_is_baked_is_what_was_steered_and_stock_transformers_opens_it(tmp_path, world):
    _, layers = world
    family = {"Qwen2MoeForCausalLM": "Qwen2-MoE", "DeepseekV3ForCausalLM": "DeepSeek-V3", "GptOssForCausalLM": "GptOss"}
    model = tiny(family[type(world[0]).__name__])
    layers = open_layers(model)
    step = Step(kind="scale", experts=((layers[0].name, 3), (layers[1].name, 1)), amount=2.5)
    made = Recipe(steps=(step, Step(kind="empty", experts=((layers[0].name, 6),))))
    steered, _ = passed(model, layers, made)
    before, _ = passed(model, layers)
    touched = made.bake(layers)
    assert len(touched) >= 2
    assert all(name.rpartition(".")[2].startswith("down_proj") for name in touched)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, steered, atol=1e-6, rtol=1e-5)
    assert (steered - before).abs().max() > 1e-3


@pytest.mark.parametrize("later", ["refill", "bias", "promote", "suppress"])
def test_a_step_that_scores_anew_may_not_undo_an_earlier_one(later):
    layers = open_layers(tiny("Mixtral"))
    first, other = layers[0].name, layers[1].name
    off = Step(kind="empty", experts=((first, 0),))
    anew = Step(kind=later, experts=((first, 3),), amount=1.0 if later == "bias" else None)
    with (
        pytest.raises(UsageError, match=f"{later} on {first} would undo empty there"),
        Recipe(steps=(off, anew)).applied(layers),
    ):
        pass
    model = tiny("Mixtral")
    for steps in ((anew, off), (off, Step(kind=later, experts=((other, 3),), amount=anew.amount))):
        passed(model, open_layers(model), Recipe(steps=steps))


def test_ftri_turned_on_takes_no_more_of_a_layer_than_a_token_is_sent_to():
    scores = torch.tensor([[9.0, 8, 7, 6], [1, 0, 0, 0]])
    assert ftri.recipe(scores, ["a", "b"], num=3, turn="on", top_k=2).steps[0].experts == (("a", 0), ("a", 1), ("b", 0))


REFUSED = [
    ({"kind": "scael", "amount": 2.0}, "did you mean scale"),
    ({"kind": "scale"}, "expected: an amount"),
    ({"kind": "empty", "amount": 1.0}, "expected: no amount"),
    ({"kind": "scale", "amount": float("nan")}, "cannot be used"),
    ({"kind": "empty", "experts": ()}, "would do nothing"),
    ({"kind": "empty", "experts": (("model.layers.0.mpl", 0),)}, "did you mean model.layers.0.mlp"),
    ({"kind": "empty", "experts": (("model.layers.0.mlp", 8),)}, "expected: 0 to 7"),
    ({"kind": "promote", "experts": tuple(("model.layers.0.mlp", e) for e in range(3))}, "expected: at most 2"),
    ({"kind": "refill", "experts": tuple(("model.layers.0.mlp", e) for e in range(7))}, "expected: at least 2"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_can_not_be_done_is_said_before_anything_runs(given, says):
    layers = open_layers(tiny("Mixtral"))

    def steer():
        step = Step(**({"experts": (("model.layers.0.mlp", 0),)} | given))
        with Recipe(steps=(step,)).applied(layers):
            pass

    with pytest.raises(UsageError) as error:
        steer()
    assert says in str(error.value)


def test_more_experts_than_there_are_can_not_be_chosen():
    with pytest.raises(UsageError, match="so many experts"):
        rice.recipe(torch.zeros(2, 4), ["a", "b"], num=9)
    with pytest.raises(UsageError, match="alpha cannot be used"):
        dsmoe.recipe(torch.zeros(2, 4), ["a", "b"], alpha=0.0)
    with pytest.raises(UsageError, match="nothing would be steered"):
        steermoe.recipe(torch.zeros(2, 4), ["a", "b"], top_k=2)


def test_the_highest_are_chosen_over_all_layers_or_in_each_and_ties_go_to_the_first():
    scores = torch.tensor([[1.0, 5, 5, 0], [9, float("nan"), 2, 2]])
    assert highest(scores, ["a", "b"], 3) == (("b", 0), ("a", 1), ("a", 2))
    assert highest(scores, ["a", "b"], 2, per_layer=True) == (("a", 1), ("a", 2), ("b", 0), ("b", 2))
