# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from anabranch.allocate.clusters.capacity import capacity_labels, rank_within
from anabranch.allocate.clusters.sinkhorn import sinkhorn_plan
from anabranch.errors import UsageError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_score(scores, capacity):
    """Every cluster repeated `capacity` times, then the assignment problem."""
    slots = scores.repeat(1, capacity)
    rows, columns = linear_sum_assignment(-slots.double().numpy())
    return slots[rows, columns].mean().item()


def score_of(scores, labels):
    return scores.gather(1, labels[:, None]).mean().item()


@settings(max_examples=200, deadline=None)
@given(
    N=st.integers(1, 60),
    K=st.integers(1, 8),
    slack=st.integers(0, 5),
    ties=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 2**31 - 1),
)
def test_sizes_are_always_within_the_bounds(N, K, slack, ties, data, seed):
    scores = torch.randn(N, K, generator=seeded(seed))
    scores = scores.round() if ties else scores
    capacity = -(-N // K) + slack
    minimum = data.draw(st.integers(0, N // K))
    labels = capacity_labels(scores, capacity, minimum)
    sizes = torch.bincount(labels, minlength=K)
    assert sizes.sum() == N
    assert minimum <= sizes.min()
    assert sizes.max() <= capacity


@settings(max_examples=50, deadline=None)
@given(N=st.integers(4, 40), seed=st.integers(0, 2**31 - 1))
def test_every_cluster_may_have_bounds_of_its_own(N, seed):
    capacity = torch.tensor([N, N // 4, N // 2])
    minimum = torch.tensor([0, 1, N // 4])
    sizes = torch.bincount(capacity_labels(torch.randn(N, 3, generator=seeded(seed)), capacity, minimum), minlength=3)
    assert (minimum <= sizes).all()
    assert (sizes <= capacity).all()


def test_room_for_all_is_the_plain_argmax():
    scores = torch.randn(200, 6, generator=seeded())
    assert torch.equal(capacity_labels(scores, 200), scores.argmax(1))


def test_prices_bring_it_close_to_the_exact_optimum_which_it_never_beats():
    centres = torch.randn(12, 8, generator=seeded(1))
    x = torch.nn.functional.normalize(centres[torch.arange(400) % 12] + torch.randn(400, 8, generator=seeded(2)), dim=1)
    scores = x @ x[:5].T
    exact = exact_score(scores, 80)
    priced = capacity_labels(scores + 0.02 * sinkhorn_plan(scores, 0.02).log_v, 80)
    assert 0.99 * exact <= score_of(scores, priced) <= exact + 1e-6
    assert 0.95 * exact <= score_of(scores, capacity_labels(scores, 80)) <= exact + 1e-6


def test_the_rows_with_least_to_lose_give_way():
    scores = torch.tensor([[1.0, 0.9], [1.0, 0.0], [1.0, 0.5], [1.0, 0.8]])
    assert capacity_labels(scores, 2).tolist() == [1, 0, 0, 1]
    assert capacity_labels(scores, 4, 1).tolist() == [1, 0, 0, 0]


def test_rank_counts_places_within_each_group():
    groups, priority = torch.randint(0, 4, (50,), generator=seeded()), torch.randn(50, generator=seeded(1))
    rows = list(zip(groups.tolist(), priority.tolist(), strict=True))
    slow = [sum(h == g and q > p for h, q in rows) for g, p in rows]
    assert rank_within(groups, priority).tolist() == slow


def test_bounds_that_cannot_hold_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"capacities together at least 10[\s\S]*capacities 9"):
        capacity_labels(torch.zeros(10, 3), 3)
    with pytest.raises(UsageError, match="minima 12"):
        capacity_labels(torch.zeros(10, 3), 10, 4)
