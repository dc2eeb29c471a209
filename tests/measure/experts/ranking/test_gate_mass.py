# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.measure.experts.ranking import gate_mass
from anabranch.measure.experts.ranking.batches import read_stats
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_weights_by_hand():
    # two tokens with weights (0.3, 0.1) and (0.2, 0.2): shares (0.75, 0.25) and (0.5, 0.5)
    stats = handmade({"a": 2}, share={"a": [[1.25, 0.75, 0.0]]})
    assert torch.equal(gate_mass.rank(stats, "a"), torch.tensor([[0.625, 0.375, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("family", ["OLMoE", "Mixtral"])
def test_equals_the_slow_loop_and_a_layer_sums_to_one_whether_or_not_the_family_normalises(family):
    made = world(1, planted=False, family=family)
    batch = made.batches[0]
    stats = read_stats(made.model, [batch], LABELS)
    scores = gate_mass.rank(stats, OWN)
    assert torch.allclose(scores.sum(1), torch.ones(len(scores)).double())
    for layer, seen in enumerate(recorded(made.model, batch)):
        expected, count = [0.0] * 8, 0
        for _, _, row, label in real_tokens(batch):
            if label == 0:
                count += 1
                weights = seen.triple.routing_weights[row].tolist()
                for e, g in zip(seen.triple.selected_experts[row].tolist(), weights, strict=True):
                    expected[e] += g / sum(weights)
        assert scores[layer].tolist() == pytest.approx([value / count for value in expected], abs=1e-6)
    plain = stats.of("weight", OWN).sum(1) / stats.num_tokens(OWN)
    assert bool((plain < 0.9).all()) == (family == "OLMoE"), "as they are, weights of families can't be compared"
