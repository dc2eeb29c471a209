# SPDX-License-Identifier: Apache-2.0
"""Stability: would another sample and another seed have found the same clusters?

Equation  : for b = 1..B: two subsamples of 80 %, two fits with different seeds, ARI_b on the common points;
            mean over b and its standard error.
Shapes    : N points, D features, B resamples.
Differs   : nothing. Stability alone does not prove groups, a cut through one Gaussian can be stable: see structure.py.
Check     : identical fits -> 1; independent labels -> 0 +- 0.02 (tests/measure/clusters/test_stability.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from anabranch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Stability:
    scores: tuple[float, ...]
    """ARI of each resample."""

    @property
    def mean(self) -> float:
        return mean(self.scores)

    @property
    def standard_error(self) -> float:
        return float(stdev(self.scores) / len(self.scores) ** 0.5)

    @property
    def warning(self) -> str | None:
        if self.mean >= 0.5:
            return None
        return f"stability {self.mean:.2f}: another seed would find other clusters, and so train other experts"


def agreement(labels: Tensor, others: Tensor) -> float:
    """Adjusted Rand index: 1 for the same partition, 0 for unrelated ones, whatever the names of the clusters."""
    return float(adjusted_rand_score(labels.cpu().numpy(), others.cpu().numpy()))


def stability(
    points: Tensor,
    fit: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    num_resamples: int = 20,
    share: float = 0.8,
) -> Stability:
    """Agreement of pairs of `fit(points, generator) -> labels` on the points that both subsamples hold."""
    if num_resamples < 2 or not 0.5 < share <= 1:
        raise UsageError(
            "stability needs overlapping subsamples",
            expected="num_resamples >= 2, 0.5 < share <= 1",
            received=f"num_resamples {num_resamples}, share {share}",
        )
    return Stability(scores=tuple(_pair(points, fit, generator, share) for _ in range(num_resamples)))


def _pair(
    points: Tensor, fit: Callable[[Tensor, torch.Generator], Tensor], generator: torch.Generator, share: float
) -> float:
    labels_2N = torch.full((2, len(points)), -1)
    for labels_N in labels_2N:
        rows = torch.randperm(len(points), generator=generator)[: round(share * len(points))]
        labels_N[rows] = fit(points[rows], generator).cpu()
    common = (labels_2N >= 0).all(0)
    return agreement(labels_2N[0, common], labels_2N[1, common])
