# SPDX-License-Identifier: Apache-2.0
"""The statistics of several processes as those of one that has read what all of them read.

Counts are equal, sums equal up to their order in float64, the highest values equal. Every process gets the result.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.statistics import MAXIMA, ExpertStats
from anabranch.train.processes import launched, naming_the_lost, processes


def merged(stats: ExpertStats) -> ExpertStats:
    """`ExpertStats.merge` over processes, in place; all have to call it, and to have collected the same sums."""
    if launched() == 1:
        return stats
    if not stats.sums:
        raise UsageError("a process has read nothing", expected="at least one batch for each", received="none")
    with naming_the_lost():
        for name in sorted(stats.sums):
            operation = dist.ReduceOp.MAX if name in MAXIMA else dist.ReduceOp.SUM
            stats.sums[name] = over_all(stats.sums[name], operation)
        for name in ("tokens", "documents", "pairs"):
            setattr(stats, name, over_all(getattr(stats, name), dist.ReduceOp.SUM))
    return stats


def over_all(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    told = value.clone().to(torch.float64).to(processes().device)
    dist.all_reduce(told, operation)
    return told.cpu()
