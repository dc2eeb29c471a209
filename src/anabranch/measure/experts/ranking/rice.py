# SPDX-License-Identifier: Apache-2.0
"""RICE: the experts that fire at marker tokens of reasoning, by normalised pointwise mutual information.

Paper     : RICE (arXiv 2505.14681).
Equation  : nPMI(x, e) = log[p(x, e) / (p(x) p(e))] / -log p(x, e), and -1 where p(x, e) = 0
            S_e = sum_x c_x nPMI(x, e)
Shapes    : L layers, N experts; markers x are labels of tokens, p are shares of the tokens of all labels named.
Differs   : nothing.
Check     : fires exactly at x 1, independent of x 0, never at x -1 (tests/measure/experts/ranking/test_rice.py).

`others` are the labels that all remaining tokens bear, other markers among them: p(e) is taken over everything read.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.measure.experts.ranking.contrast import check_contrast, num_tokens, pooled
from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def npmi(joint: Tensor, marker: float, expert: Tensor) -> Tensor:
    """log[p(x, e) / (p(x) p(e))] / -log p(x, e), from the shares p(x, e), p(x) and p(e)."""
    met = joint > 0
    safe = torch.where(met, joint, torch.full_like(joint, 0.5))
    information = (safe / (marker * torch.where(met, expert, torch.ones_like(expert)))).log()
    return torch.where(met, information / -safe.log(), torch.full_like(joint, -1.0))


def rank(
    stats: ExpertStats, target: str, others: Sequence[str] = (), *, signs: Mapping[str, float] | None = None
) -> Tensor:
    """signs    c_x by marker, such as {"<think>": 1, "</think>": -1}; not given: the target alone, 1"""
    check_contrast(stats, target, others)
    every = [target, *others]
    signs = {target: 1.0} if signs is None else signs
    if unknown := [marker for marker in signs if marker not in every]:
        raise UsageError(
            f"the marker {unknown[0]!r} is not among the tokens that are ranked over",
            expected="markers of the target and the others", received=sorted(signs),
            hint=did_you_mean(unknown[0], every),
        )  # fmt: skip
    total = num_tokens(stats, every)
    expert_LN = pooled(stats, "count", every) / total
    score_LN = torch.zeros_like(expert_LN)
    for marker, sign in signs.items():
        if share := stats.num_tokens(marker) / total:
            score_LN += sign * npmi(stats.of("count", marker) / total, share, expert_LN)
    return score_LN
