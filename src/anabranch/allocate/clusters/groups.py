# SPDX-License-Identifier: Apache-2.0
"""Which expert owns which clusters: a balanced grouping of the centroids, and how many clusters to ask for.

Paper     : balanced k-means by assignment (Malinen and Fränti 2014), applied to the K centroids.
Equation  : min over g of sum_k n_k ||C_k - G_{g_k}||^2,  every group holds floor(K/E) or ceil(K/E) clusters,
            G_e = sum_{g_k = e} n_k C_k / sum_{g_k = e} n_k.
Shapes    : K clusters of n_k images, E groups (one per expert), d features.
Differs   : equal counts of clusters; equal counts of images follow when the clusters are balanced.
Check     : brute force over all balanced groupings of 6 clusters (tests/allocate/clusters/test_groups.py).
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from anabranch.errors import UsageError

FORBIDDEN = 1e9


def auto_num_clusters(num_images: int, num_experts: int) -> int:
    """K = clip(N / 500, 4 E, 256), and never under 2 E."""
    num_clusters = max(min(max(num_images // 500, 4 * num_experts), 256), 2 * num_experts)
    if num_images < num_clusters:
        raise UsageError(
            "there are fewer images than clusters",
            expected=f"at least {num_clusters} images for {num_experts} experts",
            received=num_images,
        )
    return num_clusters


def group_clusters(
    centroids: Tensor, sizes: Tensor, num_groups: int, generator: torch.Generator, restarts: int = 10
) -> Tensor:
    """The group (K,) of every cluster, best of `restarts`; groups are numbered by their first cluster."""
    if num_groups > len(centroids):
        raise UsageError(
            f"{num_groups} experts cannot differ on {len(centroids)} clusters",
            expected=f"at least {num_groups} clusters",
            received=len(centroids),
        )
    centroids = centroids.detach().to(torch.promote_types(centroids.dtype, torch.float32))
    found = [balanced_groups(centroids, sizes, num_groups, generator) for _ in range(restarts)]
    best_K = min(found, key=lambda groups: spread(centroids, sizes, groups, num_groups))
    first_E = torch.stack([(best_K == group).nonzero()[0, 0] for group in range(num_groups)])
    return first_E.argsort().argsort()[best_K]


def group_centroids(centroids: Tensor, sizes: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """G_e: the mean of a group's centroids, weighted by their images."""
    weights_EK = torch.nn.functional.one_hot(groups, num_groups).T * sizes.to(centroids.dtype)
    return weights_EK @ centroids / weights_EK.sum(1, keepdim=True)


def spread(centroids: Tensor, sizes: Tensor, groups: Tensor, num_groups: int) -> float:
    """sum_k n_k ||C_k - G_{g_k}||^2."""
    means_Ed = group_centroids(centroids, sizes, groups, num_groups)
    return float((sizes * (centroids - means_Ed[groups]).square().sum(1)).sum())


def balanced_groups(centroids: Tensor, sizes: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """One descent from random centroids: assign to slots, move the means, until nothing moves."""
    means_Ed = centroids[torch.randperm(len(centroids), generator=generator)[:num_groups]]
    groups_K = torch.full((len(centroids),), -1)
    for _ in range(100):  # ties could go round for ever
        cost_KE = sizes[:, None] * torch.cdist(centroids, means_Ed).square()
        moved_K = assign_to_slots(cost_KE)
        if torch.equal(moved_K, groups_K):
            break
        groups_K = moved_K
        means_Ed = group_centroids(centroids, sizes, groups_K, num_groups)
    return groups_K


def assign_to_slots(cost: Tensor) -> Tensor:
    """The cheapest grouping with floor(K/E) or ceil(K/E) clusters in every group."""
    K, E = cost.shape
    spare = -K % E
    slots = cost.repeat(1, -(-K // E))
    # Blank rows take up the slots that stay empty; they may sit only in the last slot of a group.
    blank = cost.new_full((spare, slots.shape[1]), FORBIDDEN * float(cost.max() + 1))
    blank[:, -E:] = 0
    _, slot = linear_sum_assignment(torch.cat([slots, blank]).double().numpy())
    return torch.from_numpy(slot[:K]) % E
