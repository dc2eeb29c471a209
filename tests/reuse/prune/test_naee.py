# SPDX-License-Identifier: Apache-2.0
import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures import surgery
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.calibration import captured
from anabranch.reuse.prune import naee
from anabranch.reuse.prune.keep import prune

PADDED = {"input_ids": torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1)),
          "attention_mask": torch.ones(3, 12, dtype=torch.long)}  # fmt: skip
PADDED["attention_mask"][2, 7:] = 0
BATCHES = [{"input_ids": torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(2))}, PADDED]


def sliced_errors(model, num_keep):
    """Every set tried by building the layer that has no other experts: from the definition, slow on purpose."""
    errors = {}
    for i, layer in enumerate(mixture_layers(model)):
        h_TD = captured(model, [layer], BATCHES)[layer.name].hidden_states
        with torch.no_grad():
            dense_TD = layer.experts(h_TD, *layer.router(h_TD)[:0:-1])
            for keep in combinations(range(layer.num_experts), num_keep):
                smaller = mixture_layers(copy.deepcopy(model))[i]
                surgery.take(smaller, torch.tensor(keep))
                _, weights, selected = smaller.router(h_TD)
                errors[i, keep] = float((smaller.experts(h_TD, selected, weights) - dense_TD).norm() / dense_TD.norm())
    return errors


@pytest.mark.parametrize("family", ["Mixtral", "OLMoE", "GptOss"])
def test_every_set_equals_the_sliced_layer(family):
    name = "num_experts" if family == "OLMoE" else "num_local_experts"
    model = tiny(family, num_hidden_layers=2, **{name: 4})
    slow = sliced_errors(model, 2)
    found = naee.search(model, BATCHES, 2)
    assert found.exact
    for i, layer in enumerate(mixture_layers(model)):
        own = {keep: error for (j, keep), error in slow.items() if j == i}
        assert tuple(found.keep[layer.name]) == min(own, key=own.get)
        assert found.errors[layer.name] == pytest.approx(min(own.values()), rel=1e-4)


def duplicated(family="Mixtral", **changes):
    """Expert 5 of every layer is made a copy of expert 2, its row of the router with it."""
    model = tiny(family, num_experts_per_tok=1, **changes)
    for layer in mixture_layers(model):
        bank = ExpertBank(layer)
        for name, value in bank[2].tensors().items():
            bank[5].tensors()[name].copy_(value)
        layer.router.weight.data[5] = layer.router.weight.data[2]
    return model


def test_a_duplicated_expert_is_removed_first_and_costs_nothing():
    text = [{"input_ids": torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(5))}]
    model = duplicated()
    found = naee.search(model, text, 7)
    for name, keep in found.keep.items():
        assert set(range(8)) - set(keep) <= {2, 5}
        assert found.errors[name] == 0
    control = naee.search(tiny("Mixtral", num_experts_per_tok=1), text, 7)
    assert min(control.errors.values()) > 0.01
    with torch.no_grad():
        before = model(**text[0]).logits
        prune(model, found.keep)
        torch.testing.assert_close(model(**text[0]).logits, before, atol=1e-5, rtol=0)


def test_greedy_is_labelled_and_removes_the_duplicate_first():
    text = [{"input_ids": torch.randint(3, 97, (8, 50), generator=torch.Generator().manual_seed(5))}]
    found = naee.search(duplicated(num_local_experts=14, num_hidden_layers=1), text, 13)
    assert not found.exact
    assert set(range(14)) - set(next(iter(found.keep.values()))) <= {2, 5}


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), num_keep=st.integers(2, 8))
def test_no_greedy_set_beats_the_exact_one(seed, num_keep):
    layer = mixture_layers(MODEL)[0]
    h_TD = torch.randn(12, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = naee.Reconstruction(layer, h_TD, layer.router(h_TD)[0])
        exact, greedy = (found.error(choose(layer, found, num_keep, {3})) for choose in (naee.exact, naee.greedy))
    assert exact <= greedy + 1e-9
    if num_keep == 8:
        assert exact == 0


MODEL = tiny("Mixtral")


def test_batching_and_padding_change_nothing():
    rows = [{"input_ids": b["input_ids"][i : i + 1, :n]} for b in BATCHES for i, n in enumerate([10, 10] if b is
            BATCHES[0] else [12, 12, 7])]  # fmt: skip
    whole, split = naee.search(MODEL, BATCHES, 4), naee.search(MODEL, rows, 4)
    assert whole.keep == split.keep
    assert whole.errors == pytest.approx(split.errors, rel=1e-4)


def test_progressive_layers_see_what_pruned_layers_leave():
    plain, progressive = naee.search(MODEL, BATCHES, 4), naee.search_progressive(MODEL, BATCHES, 4)
    first, *later = plain.keep
    assert progressive.keep[first] == plain.keep[first]
    assert progressive.errors[first] == pytest.approx(plain.errors[first])
    assert all(progressive.errors[name] != pytest.approx(plain.errors[name]) for name in later)
    pruned = copy.deepcopy(MODEL)  # the last layer of a model whose first two were pruned, by the definition
    layers = mixture_layers(pruned)
    for layer in layers[:2]:
        surgery.take(layer, torch.tensor(progressive.keep[layer.name]))
    own = captured(pruned, layers[2:], BATCHES)[layers[2].name]
    with torch.no_grad():
        assert naee.best(layers[2], own.hidden_states, own.router_logits, 4, set())[0] == progressive.keep[later[1]]


def test_groups_stay_equal_and_protected_experts_stay():
    model = tiny("GLM-4-MoE")
    protect = [(layer.name, 7) for layer in mixture_layers(model)]
    for keep in naee.search(model, BATCHES, 4, protect).keep.values():
        assert [sum(e < 4 for e in keep), sum(e >= 4 for e in keep)] == [2, 2]
        assert 7 in keep


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match="2 to 8"):
        naee.search(MODEL, BATCHES, 1)
    with pytest.raises(UsageError, match="no calibration text"):
        naee.search(MODEL, [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}], 4)
