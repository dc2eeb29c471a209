# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.cumulative import relevant


@pytest.mark.parametrize(
    ("p", "expected"), [(0.2, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_by_hand(p, expected):
    chosen = relevant(torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64), p)
    assert chosen[0].nonzero().flatten().tolist() == expected


def test_the_whole_leaves_out_who_has_nothing_and_of_equals_the_first_is_taken():
    assert relevant(torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64), 1.0).tolist() == [[False, True, True]]
    assert relevant(torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64), 0.5).tolist() == [
        [True, True, False, False]
    ]


def test_a_share_reached_on_paper_is_reached():
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert float(scores[0, 0] + scores[0, 1]) < 0.8  # by a rounding
    assert relevant(scores, 0.8).sum() == 2


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(sum), percent=st.integers(1, 100))
def test_no_smaller_set_holds_as_much(counts, percent):
    total, experts = sum(counts), range(len(counts))
    chosen = relevant(torch.tensor([counts]).double() / total, percent / 100)[0].nonzero().flatten().tolist()
    assert 100 * sum(counts[e] for e in chosen) >= percent * total
    for smaller in combinations(experts, len(chosen) - 1):
        assert 100 * sum(counts[e] for e in smaller) < percent * total


@pytest.mark.parametrize("p", [0.0, -0.1, 1.01])
def test_no_share(p):
    with pytest.raises(UsageError, match=r"share of the relevance[\s\S]*above 0, at most 1"):
        relevant(torch.tensor([[0.5, 0.5]], dtype=torch.float64), p)


def test_scores_of_another_scale_are_refused():
    with pytest.raises(UsageError, match=r"within the layer[\s\S]*sums of 0.4 to 1"):
        relevant(torch.tensor([[0.5, 0.5], [0.2, 0.2]]).double(), 0.2)
