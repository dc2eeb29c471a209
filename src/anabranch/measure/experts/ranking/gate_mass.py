# SPDX-License-Identifier: Apache-2.0
"""Gate mass: an expert matters to a label by the weight that its tokens give it.

Paper     : the common ground of all rankings; as baseline in ESFT (arXiv 2407.01906).
Equation  : r_e = sum_t g_te / sum_j g_tj, over T
Shapes    : L layers, N experts; a layer's sum is 1.
Differs   : weights are divided by their token's sum, so that families that do not normalise can be compared.
Check     : weights by hand; a layer's sum is 1 (tests/measure/experts/ranking/test_gate_mass.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of("share", target) / max(stats.num_tokens(target), 1)
