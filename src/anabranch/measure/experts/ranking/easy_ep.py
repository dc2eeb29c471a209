# SPDX-License-Identifier: Apache-2.0
"""EASY-EP: the experts that a domain's tokens need, by what they add where the layer turns the stream.

Paper     : EASY-EP (arXiv 2504.06792).
Equation  : I_e = sum_t g_te ||E_e(x_t)|| max(1 - cos(h_t, h_t + o_t), 0)
            h stream before the block, o sum of the weighted routed experts, shared ones left out
Shapes    : L layers, N experts.
Differs   : nothing. `mixed` takes any number of experts and domains.
Check     : o = h counts nothing, o = -2 h twice; a domain of more tokens does not outweigh another in the mixture
            (tests/measure/experts/ranking/test_easy_ep.py).
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.cumulative import within_layer
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing", "outputs", "residual")


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of("turn", target)


def mixed(stats: ExpertStats, domains: Sequence[str]) -> Tensor:
    """(L, N): sum over the domains of I_e / sum_j I_j, each layer on its own."""
    if not domains or len(set(domains)) < len(domains):
        raise UsageError("domains are mixed", expected="at least one, each once", received=list(domains))
    return sum((within_layer(stats, "turn", domain) for domain in domains[1:]), within_layer(stats, "turn", domains[0]))
