# SPDX-License-Identifier: Apache-2.0
"""Super experts: the few whose outputs have massive channels, and which no pruning may take.

Paper     : Super Experts (arXiv 2507.23279).
Equation  : a_le = max over tokens and channels of |E_e(x)|;  super where a_le > the 99.5th percentile of all a,
            a_le > max(a) / 10,  l < 0.75 L;  and a_le > 20 median(a)
Shapes    : L layers that hold experts, N experts.
Differs   : the last condition is ours, with the median of the experts that were ever chosen: the largest of any model
            fulfils the first two. max / 10 is exact; `floor=True` rounds it down as the released code does. L counts
            the layers that hold experts.
Check     : one expert scaled by 100 is found alone, in a drawn model none
            (tests/measure/experts/ranking/test_super_experts.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing", "outputs")


class SuperExpert(NamedTuple):
    layer: int
    """Of `stats.layers`."""
    expert: int
    peak: float
    to_median: float
    """The peak over the median of all peaks."""


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of("peak", target)


def median_peak(peak: Tensor) -> float:
    """Of the experts that were chosen at all: one that never ran has no output to speak of."""
    chosen = peak[peak > 0]
    return float(chosen.quantile(0.5)) if len(chosen) else 0.0


def found(
    stats: ExpertStats, labels: Sequence[str] | None = None, *, percentile: float = 99.5, share: float = 0.1,
    depth: float = 0.75, ratio: float = 20.0, floor: bool = False,
) -> list[SuperExpert]:  # fmt: skip
    """The super experts, highest peak first.

    labels          whose tokens count; not given: all
    ratio           how many times the median a peak must be; 0 is the published rule
    """
    each = [stats.of("peak", label) for label in (stats.labels if labels is None else labels)]
    peak_LN = torch.stack(each).amax(0)
    median, least = median_peak(peak_LN), float(peak_LN.max()) * share
    super_LN = peak_LN > torch.quantile(peak_LN.flatten(), percentile / 100)
    super_LN &= peak_LN > (math.floor(least) if floor else least)
    super_LN &= peak_LN > ratio * median
    super_LN &= (torch.arange(len(peak_LN)) < depth * len(peak_LN))[:, None]
    places = [(int(layer), int(expert)) for layer, expert in super_LN.nonzero()]
    listed = [SuperExpert(l, e, float(peak_LN[l, e]), float(peak_LN[l, e]) / median) for l, e in places]
    return sorted(listed, key=lambda one: -one.peak)
