# SPDX-License-Identifier: Apache-2.0
"""SteerMoE: the experts that tokens of one kind activate more often than tokens of the paired kind.

Paper     : SteerMoE (arXiv 2509.09660).
Equation  : D = P_A(e active) - P_B(e active)
Shapes    : L layers, N experts; each layer's differences add up to 0.
Differs   : nothing; with several other labels, B are their tokens together.
Check     : rates by hand; exchanging A and B changes the sign alone
            (tests/measure/experts/ranking/test_steermoe.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.ranking.contrast import check_contrast, num_tokens, pooled
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def activation_rate(stats: ExpertStats, labels: Sequence[str]) -> Tensor:
    """P(e active): the share of the tokens that e is selected for."""
    return pooled(stats, "count", labels) / num_tokens(stats, labels)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    check_contrast(stats, target, others)
    return activation_rate(stats, [target]) - activation_rate(stats, others)
