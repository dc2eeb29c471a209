# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import frequency
from anabranch.measure.experts.ranking.batches import read_stats
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_counts_by_hand():
    stats = handmade({"a": 4, "b": 1}, count={"a": [[4, 3, 1, 0]], "b": [[0, 0, 1, 1]]})
    assert torch.equal(frequency.rank(stats, "a"), torch.tensor([[1.0, 0.75, 0.25, 0.0]], dtype=torch.float64))
    assert torch.equal(frequency.rank(stats, "b"), torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3"])
def test_equals_the_slow_loop_and_a_layer_sums_to_the_number_chosen(family):
    made = world(0, planted=False, family=family)
    batch = made.batches[0]
    scores = frequency.rank(read_stats(made.model, [batch], LABELS), OWN)
    assert torch.allclose(scores.sum(1), torch.full((len(scores),), 2.0).double())
    for layer, seen in enumerate(recorded(made.model, batch)):
        rows = [row for _, _, row, label in real_tokens(batch) if label == 0]
        chosen = [e for row in rows for e in seen.triple.selected_experts[row].tolist()]
        assert scores[layer].tolist() == pytest.approx([chosen.count(e) / len(rows) for e in range(8)])


def test_selection_by_groups_is_counted_as_it_was_not_as_the_logits_suggest():
    made = world(0, planted=False, family="DeepSeek-V3")
    batch = made.batches[0]
    scores = frequency.rank(read_stats(made.model, [batch], LABELS), OWN)
    derived = torch.zeros_like(scores)
    for layer, seen in enumerate(recorded(made.model, batch)):
        for _, _, row, label in real_tokens(batch):
            if label == 0:
                derived[layer, seen.triple.router_logits[row].topk(2).indices] += 1
    assert not torch.allclose(derived * 2 / derived.sum(1, keepdim=True), scores, atol=0.05)


def test_an_unknown_label_is_named():
    with pytest.raises(UsageError, match=r"know no 'onw'[\s\S]*did you mean own"):
        frequency.rank(handmade({"own": 1}, count={"own": [[1, 1]]}), "onw")
