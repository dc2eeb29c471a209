# SPDX-License-Identifier: Apache-2.0
"""ESFT, token selection: an expert is relevant to a task by the share of the layer's choices that fall on it.

Paper     : Expert-Specialized Fine-Tuning (arXiv 2407.01906).
Equation  : r_e = sum_t a_te / (K T)
Shapes    : L layers, N experts, T tokens, K chosen per token; a layer's sum is 1.
Differs   : nothing. `cumulative.relevant(scores, p)` then takes the fewest experts of each layer that hold p.
Check     : every layer's sum is 1; permuted layers permute the answer, which a sum over layers does not keep
            (tests/measure/experts/ranking/test_esft_token.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.ranking.cumulative import within_layer
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return within_layer(stats, "count", target)
