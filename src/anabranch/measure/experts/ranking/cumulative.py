# SPDX-License-Identifier: Apache-2.0
"""The fewest experts of each layer that together hold a given share of the relevance.

Shapes    : L layers, N experts.
"""

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.statistics import ExpertStats

ROUNDING = 1e-9
"""Shares are quotients of sums: one that equals p on paper may miss it by a rounding."""


def within_layer(stats: ExpertStats, name: str, label: str) -> Tensor:
    """(L, N): a sum as shares of its layer.

    Raises:
        UsageError: the label has no tokens, so that a layer has no shares.
    """
    sums_LN = stats.of(name, label)
    totals_L1 = sums_LN.sum(1, keepdim=True)
    if bool((totals_L1 <= 0).any()):
        raise UsageError(f"no token of {label!r} was routed", expected="tokens in every layer", received="a sum of 0")
    return sums_LN / totals_L1


def relevant(scores: Tensor, p: float) -> Tensor:
    """(L, N) bool: of each layer the smallest set whose scores add up to p; of equals the first.

    scores      (L, N), which every layer's sum is 1 of

    Raises:
        UsageError: p is no share, or a layer's scores are none.
    """
    if not 0 < p <= 1:
        raise UsageError("p is a share of the relevance", expected="above 0, at most 1", received=p)
    sums_L = scores.sum(1)
    if bool((scores < 0).any()) or bool((sums_L - 1).abs().gt(1e-6).any()):
        raise UsageError(
            "relevance is taken within the layer", expected="scores of at least 0 whose sum is 1 in every layer",
            received=f"sums of {float(sums_L.min()):.4g} to {float(sums_L.max()):.4g}",
        )  # fmt: skip
    sorted_LN, order_LN = scores.sort(dim=1, descending=True, stable=True)
    before_LN = sorted_LN.cumsum(1) - sorted_LN
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order_LN, before_LN < p - ROUNDING)
