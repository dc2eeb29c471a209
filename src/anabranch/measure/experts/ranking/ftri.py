# SPDX-License-Identifier: Apache-2.0
"""fTRI: the experts whose activation differs most between prompts that show a behaviour and prompts that do not.

Paper     : Mixture of Tunable Experts (arXiv 2502.11096).
Equation  : A_p = sum_t a_te over the tokens of prompt p,  D_y = mean_{p in y} A_p - mean_{p not in y} A_p
Shapes    : L layers, N experts; the labels are classes of responses, which all tokens of a prompt bear.
Differs   : A_p is divided by the length of p unless `per_token=False`: the raw map grows with the prompt, so that it
            tells long from short classes as soon as responses differ in length.
Check     : maps by hand; a prompt written twice changes the raw map alone
            (tests/measure/experts/ranking/test_ftri.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.measure.experts.ranking.contrast import check_contrast, num_documents, pooled
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def mean_map(stats: ExpertStats, labels: Sequence[str], per_token: bool) -> Tensor:
    """mean_p A_p, every prompt with the same weight."""
    return pooled(stats, "document_rate" if per_token else "count", labels) / num_documents(stats, labels)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = (), *, per_token: bool = True) -> Tensor:
    check_contrast(stats, target, others)
    return mean_map(stats, [target], per_token) - mean_map(stats, others, per_token)
