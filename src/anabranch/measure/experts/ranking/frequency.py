# SPDX-License-Identifier: Apache-2.0
"""Frequency: an expert matters to a label as often as its tokens are sent there.

Paper     : the common ground of all rankings; as baseline in ESFT (arXiv 2407.01906) and REAP (arXiv 2510.13999).
Equation  : r_e = sum_t a_te / T
Shapes    : L layers, N experts; the sum of a layer is K, the number chosen per token.
Differs   : nothing.
Check     : counts by hand; a layer's sum is K (tests/measure/experts/ranking/test_frequency.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of("count", target) / max(stats.num_tokens(target), 1)
