# SPDX-License-Identifier: Apache-2.0
"""CEFT: tune the n highest ranked experts of every layer, routers and all else frozen.

Paper     : Router Lens and CEFT (arXiv 2508.19594).
Equation  : chosen = the n experts of highest score in each layer
Shapes    : L layers, N experts; scores (L, N) of measure/experts/ranking, a row a layer.
Differs   : Any ranking may choose; the paper's is that of a copy whose routers were tuned. The experts are of the model
            as it was before that. Steps, rate and decay are ESFT's.
Check     : with n = N it equals the training of all experts by a plain optimiser; all else is the same bit for bit
            (tests/specialize/test_ceft.py).
Exempt    : off (an adapter is there or not: models/mixtures/adapter); dtype (AdamW's first steps have the size of the
            rate, whichever sign a rounded gradient has, and losses fall alike, tests/specialize/test_expert_tuning.py)
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.specialize.expert_tuning import NOT_KEPT, Kept, Training, Tuned, by_layer, tune
from anabranch.train.loop import Stream


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    num_experts: int = 8
    """Of each layer; the paper's for 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, received {self.num_experts}")


def select(scores: Tensor, num_experts: int) -> Tensor:
    """The n highest of every layer, the lower index where two are equal: (L, N) to (L, N) bool."""
    if scores.ndim != 2 or not bool(scores.isfinite().all()):
        raise UsageError("these scores rank nothing", expected="(L, N), all finite", received=tuple(scores.shape))
    if not 1 <= num_experts <= scores.shape[1]:
        raise UsageError("a layer has not so many experts", expected=f"1 to {scores.shape[1]}", received=num_experts)
    order_LN = scores.double().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order_LN[:, :num_experts], True)


def train(
    model: Any, scores: Tensor, layers: Sequence[str], batches: Iterable[Batch] | Stream, config: Config, *,
    kept: Kept = NOT_KEPT,
) -> Tuned:  # fmt: skip
    """Trains the chosen experts in place.

    scores      (L, N) of a ranking
    layers      names of the L layers, as the statistics have them
    kept        where checkpoints go, if anywhere
    """
    experts = by_layer(select(scores, config.num_experts), layers)
    facts = {"method": "specialize/ceft", "config": asdict(config)}
    return tune(model, experts, batches, config, facts=facts, kept=kept)
