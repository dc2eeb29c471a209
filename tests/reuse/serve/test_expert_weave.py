# SPDX-License-Identifier: Apache-2.0
"""ExpertWeave: every row as from a merged model of its own, the base untouched, and what it costs in experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, UsageError
from anabranch.models.mixtures.adapter import applied, difference, fused_of
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import watched
from anabranch.reuse.serve.expert_weave import ExpertWeave, memory

IDS = torch.randint(3, 97, (5, 8), generator=torch.Generator().manual_seed(1))
RAGGED = ({0: [1, 6], 1: [3]}, {0: [6], 2: [0, 2, 7]}, {1: [3, 4, 5, 0]})
"""By adapter and number of the mixture layer; the third has no experts in two of three layers."""


@torch.no_grad()
def tuned_copy(family, chosen, seed):
    model = tiny(family)
    g = torch.Generator().manual_seed(seed)
    layers = mixture_layers(model)
    for number, experts in chosen.items():
        for value in fused_of(layers[number % len(layers)]).values():
            for expert in experts:
                value[expert] += 0.1 * torch.randn(value[expert].shape, generator=g)
    return model


def adapters_of(family):
    base = tiny(family)
    return [difference(base, tuned_copy(family, chosen, seed)) for seed, chosen in enumerate(RAGGED)]


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(ids, use_cache=False).logits


@pytest.fixture(scope="module", params=["Qwen2-MoE", "DeepSeek-V3", "GptOss"])
def world(request):
    """(model, adapters, logits of the base, logits of every separately merged model)."""
    model, adapters = tiny(request.param), adapters_of(request.param)
    merged = []
    for adapter in adapters:
        with applied(model, adapter):
            merged.append(logits_of(model))
    return model, adapters, logits_of(model), merged


def test_each_row_of_a_mixed_batch_is_as_from_the_separately_merged_model(world):
    model, adapters, base, merged = world
    rows = [2, -1, 0, 1, 0]
    weave = ExpertWeave(model, adapters)
    with weave.serving(rows):
        mixed = logits_of(model)
    outside = logits_of(model)
    weave.remove()
    for b, row in enumerate(rows):
        expected = base[b] if row < 0 else merged[row][b]
        torch.testing.assert_close(mixed[b], expected, rtol=0, atol=1e-6)
        if row >= 0:
            assert (mixed[b] - base[b]).abs().max() > 1e-3, "an adapter that does nothing would show nothing"
    assert torch.equal(outside, base), "outside of serving the base answers"


def test_a_batch_of_the_base_is_the_base_bit_for_bit_and_so_is_the_model_after_removal(world):
    model, adapters, base, _ = world
    before = bits(model)
    config = model.config.to_dict()
    weave = ExpertWeave(model, adapters)
    with weave.serving([-1] * 5):
        assert torch.equal(logits_of(model), base)
    weave.remove()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits_of(model), base)
    assert model.config.to_dict() == config
    assert {layer.experts.num_experts for layer in mixture_layers(model)} == {8}


def test_generation_with_a_cache_serves_each_row_as_alone(world):
    model, adapters, _, _ = world
    ids, mask = IDS[:3], torch.ones_like(IDS[:3])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    alone = []
    for adapter in adapters:
        with applied(model, adapter):
            alone.append(model.generate(ids, **options))
    weave = ExpertWeave(model, adapters)
    with weave.serving([0, 1, 2]):
        mixed = model.generate(ids, **options)
    weave.remove()
    for b in range(3):
        assert torch.equal(mixed[b], alone[b][b])


def test_a_token_goes_to_its_adapters_copy_and_no_other_token_does(world):
    model, adapters, _, _ = world
    with torch.no_grad():
        seen = []
        weave = ExpertWeave(model, adapters)
        with weave.serving([0, 1, 2, -1, -1]), watched(weave.layers, seen.append):
            model(IDS)
        weave.remove()
    assert any(bool((one.triple.selected_experts >= 8).any()) for one in seen)
    for one in seen:
        tuned = [adapter.experts.get(one.layer.name, ()) for adapter in adapters]
        starts = [8 + sum(len(own) for own in tuned[:i]) for i in range(len(tuned))]
        for b, selected in enumerate(one.triple.selected_experts.view(5, -1).tolist()):
            own = tuned[b] if b < 3 else ()
            for j in selected:
                if j < 8:
                    assert j not in own
                else:
                    assert starts[b] <= j < starts[b] + len(own)


def test_memory_by_hand():
    """M 4, two layers; adapters tuned (1, 2) and (0, 1): blocks of 2 -> 2 (4 + 2 2) = 16, ragged 2 4 + 4 = 12."""
    found = memory(4, [(1, 2), (0, 1)])
    assert (found.ragged, found.padded, found.separate) == (12, 16, 24)
    assert found.fragmentation == pytest.approx(16 / 12)
    assert memory(64, [(13, 13)]).fragmentation == 1


def test_what_is_held_is_what_the_arithmetic_says(world):
    model, adapters, _, _ = world
    held_before = sum(value.numel() for layer in mixture_layers(model) for value in fused_of(layer).values())
    one = held_before // sum(layer.num_experts for layer in mixture_layers(model))
    weave = ExpertWeave(model, adapters)
    held = sum(value.numel() for layer in mixture_layers(model) for value in fused_of(layer).values())
    said = weave.memory
    weave.remove()
    assert held == one * said.ragged < one * said.padded < one * said.separate


@settings(max_examples=100, deadline=None)
@given(M=st.integers(1, 32), A=st.integers(1, 5), L=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_fragmentation_is_at_least_one_and_one_where_all_tuned_as_many(M, A, L, seed):
    g = torch.Generator().manual_seed(seed)
    tuned = torch.randint(0, M + 1, (A, L), generator=g).tolist()
    found = memory(M, tuned)
    ragged = sum(M + sum(tuned[i][layer] for i in range(A)) for layer in range(L))
    slow = L * (M + A * max(max(own) for own in tuned)) / ragged
    assert found.fragmentation == pytest.approx(slow)
    assert slow >= 1
    assert found.ragged <= found.padded <= found.separate
    assert memory(M, [[M // 2] * L] * A).fragmentation == 1


def test_adapters_that_touched_more_than_experts_or_have_another_base_change_nothing():
    model = tiny("Qwen2-MoE")
    good = difference(model, tuned_copy("Qwen2-MoE", {0: [1]}, 0))
    router = tuned_copy("Qwen2-MoE", {0: [1]}, 0)
    attention = tuned_copy("Qwen2-MoE", {0: [1]}, 0)
    with torch.no_grad():
        mixture_layers(router)[1].router.weight[2] += 1
        attention.model.layers[0].self_attn.q_proj.weight[0] += 1
    before = bits(model)
    for wrong, named in ((router, "mlp.gate.weight"), (attention, "q_proj.weight")):
        with pytest.raises(UsageError, match="adapter 1 changed more than routed experts") as error:
            ExpertWeave(model, [good, difference(model, wrong)])
        assert named in str(error.value)
    foreign = difference(tiny("Qwen2-MoE", seed=1), tiny("Qwen2-MoE", seed=1))
    with pytest.raises(UsageError, match="tuned on another base model"):
        ExpertWeave(model, [good, foreign])
    with pytest.raises(UsageError, match="at least one adapter"):
        ExpertWeave(model, [])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_wrong_rows_say_what_was_expected(world):
    model, adapters, _, _ = world
    weave = ExpertWeave(model, adapters)
    try:
        for rows in ([0, 3], [-2], []):
            with pytest.raises(UsageError, match=r"-1 \(the base\) to 2"), weave.serving(rows):
                pass
        with pytest.raises(UsageError, match="another number of rows"), weave.serving([0, 1, 2]):
            logits_of(model)
        with pytest.raises(AnabranchError, match="never ran"), weave.serving([0]):
            pass
    finally:
        weave.remove()
