# SPDX-License-Identifier: Apache-2.0
"""A path for every cluster: the branches it takes in a balanced tree over the centroids.

Paper     : Liu et al., AAAI 2022, "Task-customized Self-supervised Pre-training with Scalable Dynamic Routing"
            (arXiv 2205.13267): every sub-net learns from one cluster.
Equation  : digits of cluster k = (b_1, ..., b_S);  b_s = the group of k when the clusters that share b_1 .. b_{s-1} are
            divided into G balanced groups (clusters/groups), so that similar clusters share their first digits. A
            cluster that is alone after l levels starts over, b_{l+1} = b_1, ..: where there are fewer clusters than
            paths, they part ways at every level.
Shapes    : K clusters of n_k images, d features, G branches a node, S levels; K <= G^S.
Differs   : which cluster takes which path is our choice, as the paper's could not be read; `shuffled` is its control.
Check     : K = G^S is a bijection, a planted hierarchy comes back (tests/allocate/clusters/test_tree.py).
"""

import torch
from torch import Tensor

from anabranch.allocate.clusters.groups import group_clusters


def grow(centroids: Tensor, sizes: Tensor, groups: int, depth: int, generator: torch.Generator) -> Tensor:
    """Digits (K, S) int64, each below `groups`, no two rows alike; the first digit is the branch at the root.

    Args:
        centroids: (K, d). sizes: (K,) images of every cluster. groups: G. depth: S.
    """
    check(len(centroids), groups, depth)
    digits_KS = torch.zeros(len(centroids), depth, dtype=torch.int64)
    node_K = torch.zeros(len(centroids), dtype=torch.int64)
    alone_K = torch.zeros(len(centroids), dtype=torch.int64)  # levels after which a cluster is alone; 0 before
    for level in range(depth):
        for node in range(int(node_K.max()) + 1):
            rows = (node_K == node).nonzero()[:, 0]
            if alone_K[rows[0]]:
                digits_KS[rows, level] = digits_KS[rows, level - int(alone_K[rows[0]])]
            else:
                digits_KS[rows, level] = divide(centroids[rows], sizes[rows], groups, generator)
        node_K = (node_K * groups + digits_KS[:, level]).unique(return_inverse=True)[1]
        alone_K[(alone_K == 0) & (node_K.bincount()[node_K] == 1)] = level + 1
    return digits_KS


def divide(centroids: Tensor, sizes: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """The branch (n,) of each cluster of one node: groups of floor(n / G) or ceil(n / G), some empty where n < G."""
    return group_clusters(centroids, sizes, min(groups, len(centroids)), generator)


def num_nodes(num_clusters: int, groups: int, depth: int) -> int:
    """Nodes of the tree at a depth, which the balance fixes before any cluster is known."""
    sizes = [num_clusters]
    for _ in range(depth):
        sizes = [part for n in sizes for part in _parts(n, min(groups, n))]
    return len(sizes)


def _parts(total: int, count: int) -> list[int]:
    return [total // count + (i < total % count) for i in range(count)]


def shuffled(digits: Tensor, generator: torch.Generator) -> Tensor:
    """The same paths, dealt to the clusters at random: what a tree without meaning would give."""
    return digits[torch.randperm(len(digits), generator=generator)]


def check(num_clusters: int, groups: int, depth: int) -> None:
    if groups < 1 or depth < 1:
        raise ValueError(f"groups, depth: expected at least 1, received {groups}, {depth}")
    if not 1 <= num_clusters <= groups**depth:
        raise ValueError(f"centroids: expected 1..groups ** depth ({groups**depth}) clusters, received {num_clusters}")
