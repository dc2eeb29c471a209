# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import esft_gate
from anabranch.measure.experts.ranking.batches import read_stats
from anabranch.measure.experts.ranking.cumulative import relevant
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_by_hand_the_layer_total_is_divided_out_before_p_is_taken():
    weights = torch.tensor([[0.2, 0.12, 0.04, 0.04], [0.02, 0.02, 0.02, 0.34]]).double()  # of one token, sum 0.4
    scores = esft_gate.rank(handmade({"a": 1}, weight={"a": weights}), "a")
    assert scores[0].tolist() == pytest.approx([0.5, 0.3, 0.1, 0.1])
    assert relevant(scores, 0.5).tolist() == [[True, False, False, False], [False, False, False, True]]
    undivided = weights.sort(descending=True).values.cumsum(1)
    assert bool((undivided < 0.5).all()), "undivided, no set of experts reaches p"


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3"])
def test_equals_the_slow_loop_in_families_that_normalise_and_that_do_not(family):
    made = world(3, planted=False, family=family)
    batch = made.batches[0]
    scores = esft_gate.rank(read_stats(made.model, [batch], LABELS), OWN)
    assert torch.allclose(scores.sum(1), torch.ones(len(scores)).double())
    for layer, seen in enumerate(recorded(made.model, batch)):
        mean = [0.0] * 8
        for _, _, row, label in real_tokens(batch):
            if label == 0:
                for slot, e in enumerate(seen.triple.selected_experts[row].tolist()):
                    mean[e] += float(seen.triple.routing_weights[row, slot])
        assert scores[layer].tolist() == pytest.approx([value / sum(mean) for value in mean], abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), factor=st.floats(0.01, 100))
def test_neither_other_layers_nor_a_layers_scale_change_a_layer(seed, factor):
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled = weights * torch.tensor([[factor], [1.0], [1.0]])
    scores = [esft_gate.rank(handmade({"a": 1}, weight={"a": each}), "a") for each in (weights, scaled)]
    assert torch.allclose(scores[0], scores[1])
    by_layers = [each / each.sum(0, keepdim=True) for each in (weights, scaled)]
    assert abs(factor - 1) < 0.1 or not torch.allclose(by_layers[0][1:], by_layers[1][1:]), "the sum over layers does"


def test_a_label_without_tokens_has_no_shares():
    with pytest.raises(UsageError, match=r"no token of 'a' was routed"):
        esft_gate.rank(handmade({"a": 0}, weight={"a": [[0, 0]]}), "a")
