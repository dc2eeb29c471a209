# SPDX-License-Identifier: Apache-2.0
import copy
from unittest.mock import patch

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import mixture_layers, open_layers
from anabranch.models.mixtures.routing import changed, off_refill
from anabranch.models.mixtures.surgery import FUSED, append_experts, keep_experts, permute_experts

IDS = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(4))
GROUPED = {"DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"}
KEPT = (0, 2, 3, 4, 5, 7)
"""Without 1 and 6: three of each group of four."""


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def the_same(model, count=None):
    return {layer.name: list(KEPT if count is None else range(count)) for layer in mixture_layers(model)}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return set(after) == set(before) and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_refilled_slots_are_the_sliced_saved_and_reloaded_model(family, tmp_path):
    model = tiny(family)
    layers, fewer = open_layers(model), copy.deepcopy(model)
    keep_experts(fewer, the_same(model))
    fewer.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert unchanged(again, state(fewer))
    assert [layer.num_experts for layer in open_layers(again)] == [6] * len(layers)
    assert torch.equal(logits(again), logits(fewer))
    off = torch.tensor([e not in KEPT for e in range(8)])
    with changed(layers, lambda layer, triple: off_refill(layer, triple, off)):
        assert torch.allclose(logits(model), logits(again), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(model), logits(again), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_the_balance_loss_work_after_surgery(family):
    model = tiny(family)
    keep_experts(model, the_same(model))
    new = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert new.shape == (2, 15)
    for step in range(10, 15):
        expected = logits(model, new[:, :step])[:, -1].clone()
        expected[:, 2] = -torch.inf  # no end before five tokens
        assert torch.equal(new[:, step], expected.argmax(-1))
    if "DeepSeek" not in family and family != "GLM-4-MoE":
        out = model(IDS, labels=IDS, output_router_logits=True)
        assert out.router_logits[0].shape[-1] == 6
        assert out.aux_loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_order_is_the_same_function(family):
    model, generator = tiny(family), torch.Generator().manual_seed(0)
    plain = logits(model)
    for layer in mixture_layers(model):
        half = [torch.randperm(4, generator=generator) + start for start in (4, 0)]
        order = torch.cat(half) if family in GROUPED else torch.randperm(8, generator=generator)
        first = ExpertBank(layer)[int(order[0])].down.clone()
        permute_experts(layer, order.tolist())
        assert torch.equal(ExpertBank(layer)[0].down, first)
    assert torch.allclose(logits(model), plain, atol=1e-5)
    open_layers(model)


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3", "GptOss"])
def test_the_order_back_is_bit_by_bit(family):
    model, order = tiny(family), [3, 1, 0, 2, 7, 6, 5, 4]
    before, plain = state(model), logits(model)
    back = [order.index(e) for e in range(8)]
    for layer in mixture_layers(model):
        permute_experts(layer, order)
        permute_experts(layer, back)
    assert unchanged(model, before)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_in_their_order_changes_nothing(family):
    model = tiny(family)
    before, plain, requires = state(model), logits(model), [p.requires_grad for p in model.parameters()]
    keep_experts(model, the_same(model, 8))
    assert unchanged(model, before)
    assert torch.equal(logits(model), plain)
    assert [p.requires_grad for p in model.parameters()] == requires


def more_of(layer, count):
    generator = torch.Generator().manual_seed(1)
    storage = {name: value for name in FUSED if (value := getattr(layer.experts, name, None)) is not None}
    return {name: torch.randn(count, *value.shape[1:], generator=generator) for name, value in storage.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_appended_experts_are_reached_by_a_changed_index_alone(family):
    model = tiny(family)
    plain, layers = logits(model), open_layers(model)
    for layer in layers:
        assert list(append_experts(layer, more_of(layer, 2))) == [8, 9]
    assert torch.equal(logits(model), plain)
    layer = layers[-1]
    with torch.no_grad():
        h_TD = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        one = layer.experts(h_TD, torch.full((4, 1), 9), torch.ones(4, 1))
        assert torch.allclose(one, ExpertBank(layer).run(9, h_TD), atol=1e-5)

    def to_new(layer, triple):
        return triple._replace(selected_experts=triple.selected_experts.clamp(min=1).where(
            triple.selected_experts != 0, torch.tensor(8)
        ))  # fmt: skip

    with changed(layers, to_new):
        assert not torch.allclose(logits(model), plain, atol=1e-4)
    off = torch.arange(8) == 0
    with changed(layers, lambda layer, triple: off_refill(layer, triple, off)):  # the router still knows eight
        logits(model)
    assert torch.equal(logits(model), plain)


# wrong uses: nothing is changed


def everywhere(*experts):
    return lambda names: {name: list(experts) for name in names}


@pytest.mark.parametrize(
    ("family", "keep", "message"),
    [
        ("Mixtral", lambda names: {names[0]: [0, 1]}, "do not name every layer[\\s\\S]*missing .*layers.1"),
        ("Mixtral", lambda names: everywhere(0, 1)([*names, "x"]), r"unknown \['x'\]"),
        ("Mixtral", everywhere(0, 8), "different experts of 0 to 7\n  received: \\[0, 8\\]"),
        ("Mixtral", everywhere(0, -1), "different experts of 0 to 7"),
        ("Mixtral", everywhere(0, 0, 1), "different experts of 0 to 7"),
        ("Mixtral", everywhere(3), "fewer experts than a token is sent to[\\s\\S]*least 2"),
        ("Mixtral", lambda names: everywhere(0, 1, 2)(names) | {names[1]: [0, 1]}, "different numbers of experts"),
        ("DeepSeek-V2", everywhere(0, 1, 2, 4), r"among 2 groups[\s\S]*\[3, 1\] by group"),
        ("DeepSeek-V2", everywhere(0, 4), "in the groups that a token may use[\\s\\S]*least 2"),
        ("DeepSeek-V3", everywhere(0, 4), "at least 2, the groups in their order"),
        ("GLM-4-MoE", everywhere(4, 5, 0, 1), "the groups in their order"),
        ("GLM-4-MoE", everywhere(0, 4, 1, 5), "the groups in their order"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_before_anything_changes(family, keep, message):
    model = tiny(family)
    before = state(model)
    with pytest.raises(UsageError, match=message):
        keep_experts(model, keep([layer.name for layer in mixture_layers(model)]))
    assert unchanged(model, before)
    assert len(open_layers(model)[0].router.weight) == 8


def test_groups_that_could_not_fill_a_tokens_slots_would_be_left_by_the_router():
    """Why that is refused: a token with more slots than its groups hold takes experts outside of them."""
    model = tiny("DeepSeek-V3", num_experts_per_tok=3)
    names = [layer.name for layer in mixture_layers(model)]
    keep = everywhere(0, 1, 4, 5)(names)
    with pytest.raises(UsageError, match="in the groups that a token may use"):
        keep_experts(model, keep)
    with patch("anabranch.models.mixtures.surgery.check_keep"):
        keep_experts(model, keep)
    layer = mixture_layers(model)[0]
    _, weights, selected = layer.router(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    assert ((selected // 2).min(-1).values != (selected // 2).max(-1).values).all()
    assert (weights > 0).all()


@pytest.mark.parametrize(
    ("family", "order", "message"),
    [
        ("Mixtral", [0, 1, 2], "each of 0 to 7 once"),
        ("Mixtral", [0] * 8, "each of 0 to 7 once"),
        ("DeepSeek-V3", [0, 4, 2, 3, 1, 5, 6, 7], "an expert can't leave its own"),
    ],
)
def test_a_wrong_order_is_refused(family, order, message):
    model = tiny(family)
    before = state(model)
    with pytest.raises(UsageError, match=message):
        permute_experts(mixture_layers(model)[0], order)
    assert unchanged(model, before)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_of_another_shape_are_not_appended(family):
    model = tiny(family)
    layer, before = mixture_layers(model)[0], state(model)
    good = more_of(layer, 2)
    uneven = good | {"down_proj": good["down_proj"][:1]}
    narrow = good | {"down_proj": good["down_proj"][..., 1:]}
    for wrong in (uneven, narrow, {"down_proj": good["down_proj"]}, good | {"x": good["down_proj"]}):
        with pytest.raises(UsageError, match=r"model.layers.0.mlp cannot take these experts"):
            append_experts(layer, wrong)
        assert unchanged(model, before)
