# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import steermoe
from anabranch.measure.experts.ranking.batches import read_stats
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OTHER, OWN, world


def test_rates_by_hand():
    stats = handmade({"a": 4, "b": 8}, count={"a": [[4, 3, 1]], "b": [[2, 6, 8]]})
    assert steermoe.rank(stats, "a", ["b"]).tolist() == [[0.75, 0.0, -0.75]]


@pytest.mark.parametrize("family", ["OLMoE", "GptOss"])
def test_equals_the_slow_loop_and_the_differences_of_a_layer_add_up_to_nothing(family):
    made = world(4, family=family, mixed=True)
    batch = made.batches[0]
    scores = steermoe.rank(read_stats(made.model, [batch], LABELS), OWN, [OTHER])
    assert float(scores.sum(1).abs().max()) < 1e-9
    for layer, seen in enumerate(recorded(made.model, batch)):
        active, tokens = torch.zeros(2, 8), torch.zeros(2)
        for _, _, row, label in real_tokens(batch):
            active[label, seen.triple.selected_experts[row]] += 1
            tokens[label] += 1
        rates = active / tokens[:, None]
        assert scores[layer].tolist() == pytest.approx((rates[0] - rates[1]).tolist(), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_exchanged_sides_change_the_sign_alone(seed):
    counts = torch.randint(0, 9, (2, 3, 4), generator=torch.Generator().manual_seed(seed))
    stats = handmade({"a": 9, "b": 13}, count={"a": counts[0], "b": counts[1]})
    assert torch.equal(steermoe.rank(stats, "a", ["b"]), -steermoe.rank(stats, "b", ["a"]))


def test_one_side_is_no_pair():
    with pytest.raises(UsageError, match="ranked against other labels"):
        steermoe.rank(handmade({"a": 1}, count={"a": [[1, 1]]}), "a")
