# SPDX-License-Identifier: Apache-2.0
import copy
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import Expert, ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import watched
from anabranch.reuse.merge.mc_smoe import (
    align,
    distillation,
    dominant_experts,
    grouped,
    merge,
    reorder,
    similarity,
    unit_order,
)
from anabranch.reuse.merge.tie import members, remapped, slice_storage, tie, weighted_mean

FAMILIES = ["Mixtral", "GptOss", "DeepSeek-V3"]
BATCHES = [{"input_ids": torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(1))}]


def tiny_double(family):
    model = tiny(family).double()
    model.set_experts_implementation("eager")  # the grouped product of a CPU knows no float64
    return model


def logits_of(model):
    with torch.no_grad():
        return model(**BATCHES[0], use_cache=False).logits


def permuted_copy(layer, of, to, seed=0):
    """Expert `to` becomes `of` with its hidden units in another order."""
    bank = ExpertBank(layer)
    for name, value in bank[of].tensors().items():
        bank[to].tensors()[name].copy_(value)
    reorder(bank[to], torch.randperm(layer.expert_hidden_size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_leaves_every_function_alone(family):
    model = tiny_double(family)
    layer = mixture_layers(model)[0]
    bank = ExpertBank(layer)
    x_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).double()
    before = [bank.run(e, x_TD) for e in range(8)]
    weights = bank[3].gate.clone()
    align(layer, [0, 0, 0, 0, 5, 5, 5, 5])
    for e in range(8):
        assert float((bank.run(e, x_TD) - before[e]).abs().max()) < 1e-12
    assert not torch.equal(weights, bank[3].gate)


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_copies_merge_without_loss_only_when_aligned(family):
    model = tiny_double(family)
    for layer in mixture_layers(model):
        permuted_copy(layer, 2, 5)
    expected, labels = logits_of(model), [0, 1, 2, 3, 4, 2, 6, 7]
    aligned, plain = copy.deepcopy(model), copy.deepcopy(model)
    for layer in mixture_layers(aligned):
        align(layer, labels)
        tie(layer, labels, torch.tensor([1.0, 1, 3, 1, 1, 1, 1, 1]))
    for layer in mixture_layers(plain):
        tie(layer, labels, torch.tensor([1.0, 1, 3, 1, 1, 1, 1, 1]))
    assert float((logits_of(aligned) - expected).abs().max()) < 1e-5  # norms and routers round to float32
    assert float((logits_of(plain) - expected).abs().max()) > 1e-2


def test_usage_three_to_one_by_hand_and_a_group_of_one_is_left_bit_by_bit():
    model = tiny("Mixtral")
    layer = mixture_layers(model)[0]
    bank = ExpertBank(layer)
    before = {e: {name: value.clone() for name, value in bank[e].tensors().items()} for e in range(8)}
    tie(layer, [0, 0, 2, 3, 4, 4, 4, 7], torch.tensor([3.0, 1, 5, 0, 0, 0, 0, 2]))
    for name in ("gate", "up", "down"):
        by_hand = 0.75 * before[0][name] + 0.25 * before[1][name]
        torch.testing.assert_close(getattr(bank[0], name), by_hand)
        assert torch.equal(getattr(bank[0], name), getattr(bank[1], name))
        never_used = (before[4][name] + before[5][name] + before[6][name]) / 3
        torch.testing.assert_close(getattr(bank[6], name), never_used)
        for e in (2, 3, 7):
            assert torch.equal(getattr(bank[e], name), before[e][name])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_assignment_is_the_best_of_all(seed):
    g = torch.Generator().manual_seed(seed)
    first, second = (Expert(*(torch.randn(4, 3, generator=g) for _ in range(2)), torch.randn(3, 4, generator=g))
                     for _ in range(2))  # fmt: skip

    def fit(order):
        return sum(
            float(first.gate[i] @ second.gate[j] + first.up[i] @ second.up[j] + first.down[:, i] @ second.down[:, j])
            for i, j in enumerate(order)
        )

    assert fit(unit_order(first, second).tolist()) == pytest.approx(max(map(fit, permutations(range(4)))), rel=1e-5)


def test_the_threshold_is_global_with_one_in_every_layer():
    layers = mixture_layers(tiny("Mixtral"))
    usage = torch.tensor([[90.0, 80, 70, 60, 0, 0, 0, 0], [9.0, 8, 7, 6, 5, 4, 3, 2], [1.0, 2, 0, 0, 0, 0, 0, 99]])
    assert dominant_experts(layers, usage, 6) == [[0, 1, 2, 3], [0], [7]]
    assert dominant_experts(layers, usage, 7, [(layers[2].name, 7)]) == [[0, 1, 2, 3], [0], [1, 7]]
    with pytest.raises(UsageError, match="3 to 24"):
        dominant_experts(layers, usage, 2)


def test_groups_follow_the_cosine_of_the_logits():
    base = torch.tensor([[1.0, -1, 2, 0.5], [1, 1, -1, 2]]).T  # (T, 2)
    logits_TN = torch.stack((base[:, 0], base[:, 1], 3 * base[:, 0] + 0.1, -base[:, 1]), 1)
    cos = torch.nn.functional.cosine_similarity
    assert float(similarity(logits_TN)[1, 2]) == pytest.approx(float(1 + cos(base[:, 1], logits_TN[:, 2], 0)) / 2)
    assert float(similarity(logits_TN)[1, 3]) == pytest.approx(0, abs=1e-7)
    assert grouped(similarity(logits_TN), [0, 1], set()) == [0, 1, 0, 0]
    assert grouped(similarity(logits_TN), [0, 1], {0}) == [0, 1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_checkpoint_and_the_sliced_storage_compute_the_merged_model(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    layers = mixture_layers(model)
    protect = [(layers[0].name, 6)]
    alone = {name: value.clone() for name, value in ExpertBank(layers[0])[6].tensors().items()}
    rows = [layer.router.weight.clone() for layer in layers]
    merged = merge(model, BATCHES, 5 * len(layers), protect)
    assert all(torch.equal(layer.router.weight, row) for layer, row in zip(layers, rows, strict=True))
    assert all(torch.equal(value, alone[name]) for name, value in ExpertBank(layers[0])[6].tensors().items())
    assert sum(len(set(own)) for own in merged.labels.values()) == 5 * len(layers)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert mixture_layers(reloaded)[0].num_experts == 8
    assert float((logits_of(reloaded) - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    index = {layer.name: slice_storage(layer, merged.labels[layer.name]) for layer in layers}
    assert sum(layer.num_experts for layer in layers) == 5 * len(layers)
    with remapped(layers, index):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)


def test_two_chosen_members_of_a_group_both_count():
    model = tiny("Mixtral")
    layers = mixture_layers(model)[:1]
    labels = [0] * 8
    tie(layers[0], labels, torch.ones(8))
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    once = ExpertBank(layers[0]).run(3, x_TD)  # the two weights of a token sum to 1
    index, seen = {layers[0].name: slice_storage(layers[0], labels)}, []
    with torch.no_grad(), remapped(layers, index), watched(layers, seen.append):
        layers[0].block(x_TD[None])
    assert seen[0].triple.selected_experts.unique().tolist() == [0]
    torch.testing.assert_close(seen[0].routed, once)


def test_a_planted_pair_is_grouped_and_lossless_and_unlike_ones_are_not():
    """Expert 5 is expert 2 reordered, and the router sends much the same tokens there; its usage is the lowest."""
    model = tiny("Mixtral")
    for layer in mixture_layers(model):
        permuted_copy(layer, 2, 5, seed=4)
        layer.router.weight.data[5] = 0.9 * layer.router.weight.data[2]
    control = tiny("Mixtral")
    for layer in mixture_layers(control):
        layer.router.weight.data[5] = 0.9 * layer.router.weight.data[2]
    protect = [(layer.name, e) for layer in mixture_layers(model) for e in (0, 1, 3, 4, 6, 7)]
    losses = []
    for one in (model, control):
        before = logits_of(one)
        merged = merge(one, BATCHES, 7 * 3, protect)
        assert all([2, 5] in members(own).values() for own in merged.labels.values())
        losses.append(float((logits_of(one) - before).abs().max()))
    assert losses[0] < 1e-4
    assert losses[1] > 1e-2


def test_distillation_by_hand():
    teacher, student = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = torch.tensor([2.0, 0.0]).softmax(0)
    kl = float((p * (p.log() - torch.tensor(0.5).log())).sum())
    assert float(distillation(torch.tensor(1.0), student, teacher)) == pytest.approx(1 + 0.2 * 4 * kl)
    assert float(distillation(torch.tensor(1.0), teacher, teacher)) == 1


def test_wrong_uses_say_what_was_expected():
    layer = mixture_layers(tiny("Mixtral"))[0]
    with pytest.raises(UsageError, match="experts 0 and 1 of a group differ"):
        slice_storage(layer, [0, 0, 2, 3, 4, 5, 6, 7])
    with pytest.raises(UsageError, match="groups of another number"):
        tie(layer, [0, 0], torch.ones(2))
    with pytest.raises(UsageError, match="has to be a count"):
        weighted_mean(ExpertBank(layer), [0, 1], torch.tensor([1.0, -1.0]))
