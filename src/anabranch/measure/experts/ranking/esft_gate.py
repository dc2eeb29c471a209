# SPDX-License-Identifier: Apache-2.0
"""ESFT, gate selection: an expert is relevant to a task by the share of the layer's combine weight that it gets.

Paper     : Expert-Specialized Fine-Tuning (arXiv 2407.01906).
Equation  : s_e = sum_t g_te / T,  r_e = s_e / sum_j s_j
Shapes    : L layers, N experts, T tokens; a layer's sum is 1.
Differs   : divided by the layer's total before a share p is taken of it (`cumulative.relevant`): where a family does
            not normalise its weights, theirs is below 1 and p would mean another share in every layer.
Check     : every layer's sum is 1 in families that normalise and that do not; weights by hand
            (tests/measure/experts/ranking/test_esft_gate.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.ranking.cumulative import within_layer
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return within_layer(stats, "weight", target)
