# SPDX-License-Identifier: Apache-2.0
"""Choose among many models by nearest neighbours on the task's own labelled images, each left out once.

Paper     : the score of SDR, Liu et al., AAAI 2022 (arXiv 2205.13267); weighted kNN of Wu et al. 2018 (1805.01978).
Equation  : score(m) = share of images i whose label wins  sum_{j in N_k(i), j != i} exp(cos(z_i, z_j) / T) [y_j = y_i];
            k = min(20, images of the smallest class);
            margin(m, m') = mean of d_i = [m right on i] - [m' right on i],  +- z_{1 - a / 2M} sd(d) / sqrt(N).
Shapes    : N images, D features, M models that were tried.
Differs   : the interval of the margin is a normal one, widened for the M models looked at (Bonferroni), where a plain
            bootstrap of the winner would call noise a preference. Scored images are those that are voted with.
Check     : slow loops; shuffled labels show no preference (tests/reuse/test_nearest.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

TEMPERATURE = 0.07
NUM_NEIGHBOURS = 20
ALPHA = 0.05
CHUNK = 1024


@dataclass(frozen=True)
class Margin:
    """Points of accuracy by which one model is ahead of another, with an interval that knows how many were tried."""

    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        return self.low > 0


def leave_one_out(features: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: which images their neighbours name rightly.

    Args:
        features: (N, D). labels: (N,) int64.

    Raises:
        ValueError: a feature that is not finite is nearest to nothing, or to all.
    """
    if not bool(features.isfinite().all()):
        raise ValueError("features: expected finite numbers, received NaN or infinity: the model diverged")
    count = int(labels.max()) + 1
    sizes = torch.bincount(labels, minlength=count)
    least = int(sizes[sizes > 0].min())
    if int((sizes > 0).sum()) < 2 or least < 2:
        raise ValueError(
            f"labels: expected at least two classes of two images, received {int((sizes > 0).sum())} classes, "
            f"the smallest of {least}"
        )
    neighbours = min(NUM_NEIGHBOURS, least)
    unit_ND = torch.nn.functional.normalize(features.float(), dim=1)
    right = []
    for rows in torch.arange(len(unit_ND)).split(CHUNK):
        cosine_BN = unit_ND[rows] @ unit_ND.T
        cosine_BN[torch.arange(len(rows)), rows] = -math.inf
        nearest = cosine_BN.topk(neighbours, dim=1)
        votes_BC = torch.zeros(len(rows), count).scatter_add_(
            1, labels[nearest.indices], ((nearest.values - 1) / TEMPERATURE).exp()
        )
        right.append(votes_BC.argmax(1) == labels[rows])
    return torch.cat(right)


def margin(right: Tensor, other: Tensor, num_tried: int) -> Margin:
    """`right` and `other` (N,) bool of two models on the same images, in points."""
    difference = 100 * (right.double() - other.double())
    mean = float(difference.mean())
    z = NormalDist().inv_cdf(1 - ALPHA / (2 * max(num_tried, 1)))
    half = z * float(difference.std(correction=1)) / math.sqrt(len(difference))
    return Margin(mean, mean - half, mean + half)


def best(scores: Sequence[float]) -> int:
    """The highest score; the earlier of equals, so that the plain model, put first, wins a tie."""
    return max(range(len(scores)), key=lambda i: scores[i])
