# SPDX-License-Identifier: Apache-2.0
"""Random experts: the floor that every ranking has to rise above.

Paper     : none; the control of every ranking.
Equation  : r_e uniform in [0, 1), drawn anew for every seed
Shapes    : L layers, N experts.
Differs   : nothing.
Check     : the same seed draws the same, the label is not read (tests/measure/experts/ranking/test_random.py).
Exempt    : experts (drawn by place, it knows no expert)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.measure.experts.statistics import ExpertStats

NEEDS = ("routing",)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = (), *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(stats.layers), stats.num_experts, generator=generator, dtype=torch.float64)
