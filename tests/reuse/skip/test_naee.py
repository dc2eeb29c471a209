# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import Triple, mixture_layers
from anabranch.models.mixtures.routing import watched
from anabranch.reuse.skip.naee import calibrate, second_over_first, skipping
from anabranch.reuse.skip.slots import without

# no token twice: equal ones would be ties
PADDED = {"input_ids": 3 + torch.randperm(94, generator=torch.Generator().manual_seed(1))[:36].view(3, 12),
          "attention_mask": torch.ones(3, 12, dtype=torch.long)}  # fmt: skip
PADDED["attention_mask"][2, 6:] = 0  # 30 real tokens


def logits_of(model):
    with torch.no_grad():
        return model(**PADDED, use_cache=False).logits


@pytest.mark.parametrize("family", ["Mixtral", "OLMoE", "DeepSeek-V3", "GptOss"])
def test_half_of_the_calibration_is_skipped(family):
    model = tiny(family)
    layers = mixture_layers(model)
    betas = calibrate(model, [PADDED])
    for layer in layers:  # one by one: the layers below leave the inputs as they were
        with skipping(layers, {layer.name: betas[layer.name]}, PADDED["attention_mask"]) as skipped:
            logits_of(model)
        assert skipped.slots == {layer.name: 60}
        assert skipped.skipped[layer.name] == 15
        assert skipped.share(layer.name) == skipped.share() == 0.25  # of both slots


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3"])
def test_beta_zero_is_the_model_bit_for_bit(family):
    model = tiny(family)
    layers = mixture_layers(model)
    with skipping(layers, dict.fromkeys((layer.name for layer in layers), 0.0)) as skipped:
        inside = logits_of(model)
    assert torch.equal(inside, logits_of(model))
    assert skipped.share() == 0
    assert skipped.slots.total() == len(layers) * 36 * 2


def test_ties_at_the_median_are_not_skipped():
    model = tiny("Mixtral")
    layers, text = mixture_layers(model), {"input_ids": torch.full((1, 6), 14)}  # one token, all states the same
    with skipping(layers, calibrate(model, [text])) as skipped, torch.no_grad():
        model(**text, use_cache=False)
    assert skipped.share(layers[0].name) < 0.25


def test_the_first_takes_the_weight_by_hand():
    triple = Triple(torch.zeros(3, 4), torch.tensor([[0.8, 0.2], [0.1, 0.6], [0.5, 0.5]]), torch.zeros(3, 2).long())
    assert second_over_first(triple.routing_weights).tolist() == pytest.approx([0.25, 1 / 6, 1])
    skip = torch.tensor([[False, True], [True, False], [False, False]])
    kept = without(triple, skip, keep_sum=True).routing_weights
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0], [0.0, 0.7], [0.5, 0.5]]))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), beta=st.floats(0, 1.2), family=st.sampled_from(["Mixtral", "DeepSeek-V3"]))
def test_a_layer_equals_the_loop_over_its_definition(seed, beta, family):
    layer = LAYERS[family]
    h_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    plain, seen = [], []
    with torch.no_grad(), watched([layer], plain.append):
        layer.block(h_TD[None])
    with torch.no_grad(), watched([layer], seen.append), skipping([layer], {layer.name: beta}) as skipped:
        layer.block(h_TD[None])
    count = 0
    for before, after in zip(plain[0].triple.routing_weights, seen[0].triple.routing_weights, strict=True):
        first, second = (0, 1) if before[0] >= before[1] else (1, 0)
        expected = before.clone()
        if before[second] / before[first] < beta:
            expected[first], expected[second] = before.sum(), 0
            count += 1
        torch.testing.assert_close(after, expected)
    assert skipped.skipped[layer.name] == count


LAYERS = {family: mixture_layers(tiny(family))[0] for family in ("Mixtral", "DeepSeek-V3")}


def test_planted_certain_tokens_are_skipped_and_undecided_ones_are_not():
    """Experts 0 and 1 share a row of the router: tokens that take both are undecided, those of expert 2 are certain."""
    layer = mixture_layers(tiny("Mixtral"))[0]
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = layer.router.weight[1, 0] = 5.0
        layer.router.weight[2, 1] = 5.0
        tokens = torch.zeros(6, 32)
        tokens[:3, 0], tokens[3:, 1] = 1.0, 1.0
        seen = []
        with watched([layer], seen.append), skipping([layer], {layer.name: 0.5}):
            layer.block(tokens[None])
    assert [(row > 0).sum().item() for row in seen[0].triple.routing_weights] == [2, 2, 2, 1, 1, 1]


def test_wrong_uses_say_what_was_expected():
    layers = mixture_layers(tiny("Mixtral", num_experts_per_tok=3))
    with pytest.raises(UsageError, match="another number of experts"):
        calibrate(tiny("Mixtral", num_experts_per_tok=3), [PADDED])
    with pytest.raises(UsageError, match="expected: 2"), skipping(layers, {}):
        pass
    layers = mixture_layers(tiny("Mixtral"))
    with pytest.raises(UsageError, match="names no layer"), skipping(layers, {"nowhere": 0.5}):
        pass
    with pytest.raises(UsageError, match="no threshold"), skipping(layers, {layers[0].name: float("nan")}):
        pass
    model = tiny("Mixtral")
    betas = calibrate(model, [PADDED])
    with pytest.raises(UsageError, match="not of the tokens"), skipping(mixture_layers(model), betas, torch.ones(2, 2)):
        logits_of(model)
