# SPDX-License-Identifier: Apache-2.0
"""ESFT: tune only the experts that a task uses, as few of each layer as hold a share p of its relevance.

Paper     : ESFT (arXiv 2407.01906).
Equation  : r_e <- r_e / sum_j r_j;  chosen = smallest set of the layer's highest r with sum r_e >= p
Shapes    : L layers, N experts; scores (L, N) of measure/experts/ranking, a row a layer.
Differs   : Scores are normalised over the experts of a layer, as p is a share of it; the released script divides by the
            sum over layers. Sequences are joined, or not, by whoever makes the batches.
Check     : p .2 and .5 of (.5, .3, .1, .1) give {0}, .51 gives {0, 1}; permuting layers permutes the answer; all that
            was not chosen is the same bit for bit after training with weight decay (tests/specialize/test_esft.py).
Exempt    : off (an adapter is there or not: models/mixtures/adapter); dtype (AdamW's first steps have the size of the
            rate, whichever sign a rounded gradient has, and losses fall alike, tests/specialize/test_expert_tuning.py)
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.ranking.cumulative import relevant
from anabranch.specialize.expert_tuning import NOT_KEPT, Kept, Training, Tuned, by_layer, tune
from anabranch.train.loop import Stream


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    p: float = 0.2
    """0.2 for scores by tokens, 0.1 for scores by gates."""
    shared: bool = False
    """Shared experts learn as well; such an adapter can be merged, not served beside others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p: expected above 0 and at most 1, received {self.p}")


def relevance(scores: Tensor) -> Tensor:
    """r_e / sum_j r_j within the layer: (L, N) float64."""
    scores_LN = scores.double()
    if scores_LN.ndim != 2 or not bool((scores_LN.isfinite() & (scores_LN >= 0)).all()):
        raise UsageError("these scores can't be shares of a layer", expected="(L, N), none below 0 or undefined")
    sums_L1 = scores_LN.sum(-1, keepdim=True)
    if not bool((sums_L1 > 0).all()):
        raise UsageError(
            "a layer has no relevant expert", expected="a score above 0 in every layer",
            received=f"none in layer {int((sums_L1[:, 0] > 0).int().argmin())}",
        )  # fmt: skip
    return scores_LN / sums_L1


def select(scores: Tensor, p: float) -> Tensor:
    """The smallest set of every layer that holds a share p of its relevance: (L, N) to (L, N) bool."""
    return relevant(relevance(scores), p)


def train(
    model: Any, scores: Tensor, layers: Sequence[str], batches: Iterable[Batch] | Stream, config: Config, *,
    kept: Kept = NOT_KEPT,
) -> Tuned:  # fmt: skip
    """Trains the chosen experts in place.

    scores      (L, N), of the task, on the model as it is
    layers      names of the L layers, as the statistics have them
    kept        where checkpoints go, if anywhere
    """
    experts = by_layer(select(scores, config.p), layers)
    facts = {"method": "specialize/esft", "config": asdict(config)}
    return tune(model, experts, batches, config, shared=config.shared, facts=facts, kept=kept)
