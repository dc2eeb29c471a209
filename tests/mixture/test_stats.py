# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.mixture import LoadStats, Routing


def routing(selected, num_experts, *, per="sample", samples=None, mask=None):
    selected = torch.tensor(selected)
    scores = torch.full((len(selected), num_experts), 1 / num_experts)
    weights = torch.ones(selected.shape)
    return Routing(scores.log(), scores, selected, weights, per, samples or len(selected), mask)


def test_loads_violation_and_dead_experts():
    stats = LoadStats()
    stats.update({"a": routing([[0], [0], [0], [1]], 4), "b": routing([[0], [1], [2], [3]], 4)})
    assert stats.tokens_per_expert["a"].tolist() == [3, 1, 0, 0]
    assert stats.max_violation() == {"a": 2.0, "b": 0.0}
    assert stats.dead_experts() == {"a": [2, 3], "b": []}


def test_no_rows_are_no_violation():
    stats = LoadStats()
    stats.update({"a": routing([[0]], 2, mask=torch.tensor([False]))})
    assert stats.dead_experts() == {"a": [0, 1]}
    assert stats.max_violation() == {"a": 0.0}


def test_padding_does_not_count_and_tokens_carry_the_label_of_their_sample():
    stats = LoadStats(num_labels=3)
    mask = torch.tensor([True, True, True, False])
    stats.update({"a": routing([[0], [1], [1], [0]], 2, per="token", samples=2, mask=mask)}, torch.tensor([2, 0]))
    assert stats.tokens_per_expert["a"].tolist() == [1, 2]
    assert stats.label_table["a"].tolist() == [[0, 0, 1], [1, 0, 1]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=20), st.integers(1, 19))
def test_a_stream_in_two_parts_merges_into_the_whole(pairs, cut):
    def collect(*streams):
        stats = LoadStats(num_labels=3)
        for stream in streams:
            if stream:
                decided = routing([[expert] for expert, _ in stream], 4)
                stats.update({"a": decided}, torch.tensor([label for _, label in stream]))
        return stats

    whole, merged = collect(pairs), collect(pairs[:cut]).merge(collect(pairs[cut:]))
    for expert in range(4):
        assert whole.tokens_per_expert["a"][expert] == sum(e == expert for e, _ in pairs)
        for label in range(3):
            assert whole.label_table["a"][expert, label] == pairs.count((expert, label))
    assert torch.equal(whole.tokens_per_expert["a"], merged.tokens_per_expert["a"])
    assert torch.equal(whole.label_table["a"], merged.label_table["a"])
    assert sum(whole.label_table["a"].flatten().tolist()) == len(pairs)


def test_statistics_keep_no_graph():
    stats = LoadStats()
    decided = routing([[0], [1]], 2)
    stats.update({"a": decided._replace(scores=decided.scores.requires_grad_())})
    assert not stats.tokens_per_expert["a"].requires_grad
    assert stats.tokens_per_expert["a"].dtype == torch.int64


def test_merging_with_nothing_changes_nothing():
    stats = LoadStats()
    stats.update({"a": routing([[0]], 2)})
    assert stats.merge(LoadStats()).tokens_per_expert["a"].tolist() == [1, 0]
    assert LoadStats().merge(stats).max_violation() == pytest.approx({"a": 1.0})
