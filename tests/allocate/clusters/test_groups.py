# SPDX-License-Identifier: Apache-2.0
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.allocate.clusters.groups import auto_num_clusters, group_centroids, group_clusters, spread
from anabranch.errors import UsageError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def best_spread(centroids, sizes, num_groups):
    """Every grouping of the clusters whose groups differ by at most one cluster."""
    best = float("inf")
    for choice in product(range(num_groups), repeat=len(centroids)):
        counts = [choice.count(group) for group in range(num_groups)]
        if max(counts) - min(counts) <= 1:
            best = min(best, spread(centroids, sizes, torch.tensor(choice), num_groups))
    return best


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6])
def test_six_clusters_are_grouped_as_well_as_brute_force_can(num_groups):
    for seed in range(3):
        centroids = torch.randn(6, 3, generator=seeded(seed))
        sizes = torch.randint(50, 100, (6,), generator=seeded(seed + 10))
        groups = group_clusters(centroids, sizes, num_groups, seeded(), restarts=30)
        assert spread(centroids, sizes, groups, num_groups) == pytest.approx(best_spread(centroids, sizes, num_groups))


@settings(max_examples=60, deadline=None)
@given(K=st.integers(1, 24), E=st.integers(1, 8), flat=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_groups_differ_by_at_most_one_cluster_and_none_is_empty(K, E, flat, seed):
    if E > K:
        return
    centroids = torch.zeros(K, 4) if flat else torch.randn(K, 4, generator=seeded(seed))
    counts = torch.bincount(group_clusters(centroids, torch.ones(K), E, seeded(seed), restarts=2), minlength=E)
    assert len(counts) == E
    assert counts.max() - counts.min() <= 1


def test_planted_groups_are_found_and_numbered_by_their_first_cluster():
    truth = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1, 2])
    centroids = 5 * torch.eye(3)[truth] + 0.1 * torch.randn(9, 3, generator=seeded())
    assert torch.equal(group_clusters(centroids, torch.ones(9), 3, seeded(1)), truth)


def test_group_centroids_weigh_clusters_by_their_images():
    centroids = torch.tensor([[0.0, 0], [4, 0], [1, 1]])
    means = group_centroids(centroids, torch.tensor([30, 10, 5]), torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[1, 0], [1, 1]]


def test_more_experts_than_clusters_is_refused():
    with pytest.raises(UsageError, match="8 experts cannot differ on 4 clusters"):
        group_clusters(torch.randn(4, 3, generator=seeded()), torch.ones(4), 8, seeded())


@pytest.mark.parametrize(
    ("num_images", "num_experts", "expected"),
    [(1_000, 4, 16), (12_000, 4, 24), (1_000_000, 8, 256), (1_000_000, 200, 400), (16, 4, 16), (3, 1, 4)],
)
def test_the_number_of_clusters_follows_the_images_within_the_experts_bounds(num_images, num_experts, expected):
    if num_images < expected:
        with pytest.raises(UsageError, match=rf"fewer images than clusters[\s\S]*received: {num_images}"):
            auto_num_clusters(num_images, num_experts)
    else:
        assert auto_num_clusters(num_images, num_experts) == expected
