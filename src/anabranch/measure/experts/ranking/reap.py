# SPDX-License-Identifier: Apache-2.0
"""REAP: what an expert adds to the tokens that are routed to it, on average over those tokens.

Paper     : REAP (arXiv 2510.13999).
Equation  : S_e = (1 / |T_e|) sum_{t in T_e} g_te ||E_e(x_t)||,  T_e the tokens that select e; 0 where there are none
Shapes    : L layers, N experts.
Differs   : g are divided by their token's sum first, as the released code came to do; `renormalise=False` leaves them.
Check     : a rare, strong expert is above a frequent, weak one, which the sum turns round
            (tests/measure/experts/ranking/test_reap.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing", "outputs")


def rank(stats: ExpertStats, target: str, others: Sequence[str] = (), *, renormalise: bool = True) -> Tensor:
    sums_LN = stats.of("share_norm" if renormalise else "weighted_norm", target)
    count_LN = stats.of("count", target)
    return torch.where(count_LN > 0, sums_LN / count_LN.clamp(min=1), torch.zeros_like(sums_LN))
