# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.allocate.clusters.groups import group_clusters
from anabranch.allocate.clusters.tree import grow, num_nodes, shuffled


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(groups, depth, seed=0):
    """G^S centroids whose true digits are known: each digit moves them along its own axes, a level ten times less."""
    index = torch.arange(groups**depth)
    truth = torch.stack([index // groups ** (depth - 1 - level) % groups for level in range(depth)], 1)
    codes = [10.0**-level * torch.nn.functional.one_hot(truth[:, level], groups) for level in range(depth)]
    noise = 10.0 ** -(depth + 1) * torch.randn(len(truth), groups * depth, generator=seeded(seed))
    return torch.cat(codes, 1) + noise, truth


def nodes(digits, level):
    """The node that every cluster reaches: a number for each prefix of digits."""
    if level == 0:
        return torch.zeros(len(digits), dtype=torch.int64)
    return digits[:, :level].unique(dim=0, return_inverse=True)[1]


def same_partition(ones, others):
    pairs = torch.stack([ones, others]).unique(dim=1)
    return pairs.shape[1] == len(ones.unique()) == len(others.unique())


@settings(max_examples=200, deadline=None)
@given(
    groups=st.integers(1, 5),
    depth=st.integers(1, 3),
    share=st.floats(0, 1),
    flat=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_cluster_has_a_path_of_its_own_and_every_node_is_balanced(groups, depth, share, flat, seed):
    K = min(max(round(share * groups**depth), 1), 30)
    centroids = torch.zeros(K, 3) if flat else torch.randn(K, 3, generator=seeded(seed))
    digits = grow(centroids, torch.ones(K), groups, depth, seeded(seed))
    assert digits.shape == (K, depth)
    assert digits.dtype == torch.int64
    assert digits.min() >= 0
    assert digits.max() < groups
    assert len(digits.unique(dim=0)) == K
    for level in range(depth):
        for node in nodes(digits, level).unique():
            parts = torch.bincount(digits[nodes(digits, level) == node, level], minlength=groups)
            assert parts.max() - parts.min() <= 1


@pytest.mark.parametrize(("groups", "depth"), [(2, 1), (2, 4), (3, 2), (4, 2), (4, 3)])
def test_a_full_tree_is_a_bijection(groups, depth):
    K = groups**depth
    digits = grow(torch.randn(K, 5, generator=seeded()), torch.ones(K), groups, depth, seeded())
    place = groups ** torch.arange(depth - 1, -1, -1)
    assert (digits * place).sum(1).sort().values.tolist() == list(range(K))


@pytest.mark.parametrize(("groups", "depth"), [(2, 3), (3, 2), (4, 2)])
def test_a_planted_hierarchy_comes_back_level_by_level(groups, depth):
    centroids, truth = planted(groups, depth)
    digits = grow(centroids, torch.full((len(truth),), 50), groups, depth, seeded(1))
    for level in range(1, depth + 1):
        assert same_partition(nodes(digits, level), nodes(truth, level))


@pytest.mark.parametrize(("K", "groups", "depth", "alone"), [(3, 3, 4, 1), (4, 2, 4, 2), (4, 2, 5, 2)])
def test_fewer_clusters_than_paths_part_ways_at_every_level(K, groups, depth, alone):
    """A path shared by all after the clusters are told apart would leave the stages split last without a purpose."""
    digits = grow(torch.randn(K, 5, generator=seeded()), torch.ones(K), groups, depth, seeded())
    for level in range(alone, depth):
        assert torch.equal(digits[:, level], digits[:, level - alone])
        assert len(digits[:, level].unique()) == groups


def test_the_root_is_the_grouping_of_groups():
    centroids, sizes = torch.randn(9, 4, generator=seeded()), torch.arange(10, 19)
    digits = grow(centroids, sizes, 3, 2, seeded(2))
    assert torch.equal(digits[:, 0], group_clusters(centroids, sizes, 3, seeded(2)))


def test_permuted_centroids_have_permuted_digits_but_for_the_names_of_branches():
    centroids, truth = planted(3, 2)
    order = torch.randperm(len(truth), generator=seeded(3))
    plain = grow(centroids, torch.ones(9), 3, 2, seeded())
    moved = grow(centroids[order], torch.ones(9), 3, 2, seeded())
    for level in (1, 2):
        assert same_partition(nodes(moved, level), nodes(plain, level)[order])


def test_random_paths_are_the_same_paths_dealt_otherwise():
    centroids, _ = planted(4, 2)
    digits = grow(centroids, torch.ones(16), 4, 2, seeded())
    dealt = shuffled(digits, seeded(4))
    assert not torch.equal(dealt, digits)
    assert torch.equal(dealt.unique(dim=0), digits.unique(dim=0))
    assert torch.equal(dealt, shuffled(digits, seeded(4)))
    assert not same_partition(dealt[:, 0], digits[:, 0])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    grow(torch.randn(8, 3, generator=seeded()), torch.ones(8), 2, 3, seeded())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("count", "groups", "depth", "says"),
    [
        (17, 4, 2, r"centroids: expected 1..groups \*\* depth \(16\) clusters, received 17"),
        (0, 4, 2, "received 0"),
        (4, 0, 2, "groups, depth: expected at least 1, received 0, 2"),
        (4, 2, 0, "received 2, 0"),
    ],
)
def test_wrong_shapes_of_a_tree(count, groups, depth, says):
    with pytest.raises(ValueError, match=says):
        grow(torch.zeros(count, 3), torch.ones(count), groups, depth, seeded())


@pytest.mark.parametrize("num_clusters", [1, 3, 4, 7, 13, 27])
def test_the_nodes_of_every_level_are_known_before_the_clusters(num_clusters):
    centroids = torch.randn(num_clusters, 5, generator=seeded())
    digits = grow(centroids, torch.ones(num_clusters), 3, 3, seeded())
    for level in range(1, 4):
        assert num_nodes(num_clusters, 3, level) == len(digits[:, :level].unique(dim=0))
