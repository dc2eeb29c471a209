# SPDX-License-Identifier: Apache-2.0
"""Capacity rounding: hard labels whose cluster sizes keep exact bounds.

Paper     : constrained k-means (Bradley, Bennett and Demiriz 2000) poses the problem; the greedy rule is ours.
Equation  : max over Y of sum_nk s_nk Y_nk,  Y binary, rows sum to 1,  minimum_k <= column sums <= capacity_k.
Shapes    : N rows, K clusters.
Differs   : greedy, not min-cost flow: rows with the most to lose choose first, the overflow takes its next best.
            Scores that carry the balanced plan's prices (s + epsilon log v) leave little to overflow.
Check     : sizes are always within the bounds; with prices at least 99 % of the exact optimum's score at N = 400
            (tests/allocate/clusters/test_capacity.py).
"""

import torch
from torch import Tensor

from anabranch.allocate.clusters.features import check_finite
from anabranch.allocate.clusters.record import row_argmax
from anabranch.errors import UsageError


def capacity_labels(scores: Tensor, capacity: Tensor | int, minimum: Tensor | int = 0) -> Tensor:
    """Labels (N,) that respect `capacity` and `minimum`, each one number or one per cluster."""
    N, K = scores.shape
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    check_finite(scores)  # no margin is larger than NaN
    capacity_K = torch.as_tensor(capacity).expand(K)
    minimum_K = torch.as_tensor(minimum).expand(K)
    if capacity_K.sum() < N or minimum_K.sum() > N or (minimum_K > capacity_K).any():
        raise UsageError(
            "these sizes cannot hold the rows",
            expected=f"minimum <= capacity, minima together at most {N}, capacities together at least {N}",
            received=f"minima {minimum_K.sum()}, capacities {capacity_K.sum()}",
        )
    return raise_to_minimum(scores, fill(scores, capacity_K), minimum_K)


def fill(scores: Tensor, capacity: Tensor) -> Tensor:
    """Every waiting row asks for its best open cluster; a full cluster keeps those with the largest margin.

    Each pass closes a cluster or ends, so there are at most K passes, over ever fewer rows.
    """
    labels_N = torch.full((len(scores),), -1)
    free_K = capacity.clone()
    waiting_W, open_WK = torch.arange(len(scores)), scores.clone()
    while len(waiting_W):
        choice_W = row_argmax(open_WK)
        best_W = open_WK.gather(1, choice_W[:, None]).squeeze(1)
        # In place, for a row is only turned away by a cluster that is full, and so closed to it from now on.
        margin_W = best_W - open_WK.scatter_(1, choice_W[:, None], -torch.inf).amax(1)
        kept_W = choose(choice_W, margin_W, free_K)
        labels_N[waiting_W[kept_W]] = choice_W[kept_W]
        free_K -= torch.bincount(choice_W[kept_W], minlength=len(free_K))
        waiting_W, open_WK = waiting_W[~kept_W], open_WK[~kept_W]
        open_WK[:, free_K == 0] = -torch.inf
    return labels_N


def choose(choice: Tensor, margin: Tensor, free: Tensor) -> Tensor:
    """Which rows get the cluster they ask for: all where there is room, else the largest margins."""
    kept_W = torch.ones_like(choice, dtype=torch.bool)
    crowded_K = torch.bincount(choice, minlength=len(free)) > free
    rows = crowded_K[choice].nonzero().flatten()
    kept_W[rows] = rank_within(choice[rows], margin[rows]) < free[choice[rows]]
    return kept_W


def rank_within(groups: Tensor, priority: Tensor) -> Tensor:
    """Place (0 = first) of every row among the rows of its own group, by falling priority."""
    order = priority.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[groups[order]]
    return rank


def raise_to_minimum(scores: Tensor, labels: Tensor, minimum: Tensor) -> Tensor:
    """Clusters that are too small take the rows that lose least, from clusters that can spare them."""
    labels_N = labels.clone()
    for k in (torch.bincount(labels_N, minlength=len(minimum)) < minimum).nonzero().flatten().tolist():
        sizes_K = torch.bincount(labels_N, minlength=len(minimum))
        gain_N = scores[:, k] - scores.gather(1, labels_N[:, None]).squeeze(1)
        spare_K = (sizes_K - minimum).clamp(min=0)
        movable = (rank_within(labels_N, gain_N) < spare_K[labels_N]).nonzero().flatten()
        lacking = int(minimum[k] - sizes_K[k])
        labels_N[movable[gain_N[movable].argsort(descending=True, stable=True)[:lacking]]] = k
    return labels_N
