# SPDX-License-Identifier: Apache-2.0
"""How many directions do features use? Few of them mean a collapse that the spread of normed embeddings cannot see.

Paper     : dimensional collapse, Jing et al. 2022 (arXiv 2110.09348).
Equation  : x = (z - mean) / sd for each dimension;  variances v_1 >= v_2 >= .. of x along its principal directions;
            directions = least r with (v_1 + .. + v_r) / sum v >= 0.95.
Shapes    : N features z of D dimensions.
Differs   : a count at a share of the variance, not a spectrum; dimensions that are constant are left out.
Check     : r independent directions count as r (tests/measure/test_rank.py).
"""

import torch
from torch import Tensor

from anabranch.errors import UsageError

SHARE = 0.95
CONSTANT = 1e-6
FEWER = 0.5
"""Share of a healthy model's directions below which features count as collapsed."""


def directions(features: Tensor) -> int:
    """Number of principal directions that hold 95 % of the variance of standardised features (N, D); 0 if none vary."""
    if not features.isfinite().all():
        raise UsageError(
            "the features hold values that are not finite", hint="the model diverged: lower its learning rate"
        )
    variance_D, mean_D = torch.var_mean(features.double(), dim=0, correction=0)
    kept = variance_D.sqrt() >= CONSTANT
    if not kept.any():
        return 0
    x_ND = (features.double()[:, kept] - mean_D[kept]) / variance_D[kept].sqrt()
    variances = torch.linalg.eigvalsh(torch.cov(x_ND.T).reshape(int(kept.sum()), -1)).flip(0).clamp(min=0)
    return int((variances.cumsum(0) / variances.sum() < SHARE).sum()) + 1


def collapsed(found: int, healthy: int) -> bool:
    """Does a model use fewer than half of the directions that a healthy one, of which it was made, uses?"""
    return found < FEWER * healthy
