# SPDX-License-Identifier: Apache-2.0
"""TCESS: an expert matters to a task by the router logits of the tokens that put it among their highest.

Paper     : PreMoe (arXiv 2505.17639).
Equation  : z'_te = z_te where e is among the K_a highest of t and its share of the softmax over these is at least r,
            else 0;  S_e = mean_t z'_te
Shapes    : L layers, N experts, T tokens.
Differs   : `softmax=True` sums the probability softmax(z)_te in place of the logit: a logit below 0 puts an expert that
            was highest behind one that never was.
Check     : a matrix by hand, and the case of negative logits both ways (tests/measure/experts/ranking/test_tcess.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch, read
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import open_layers
from anabranch.models.mixtures.routing import Seen

SUM = "tcess"
NEEDS = (SUM,)


def masked_logits(logits: Tensor, highest: int = 1, least: float = -1.0, *, softmax: bool = False) -> Tensor:
    """z'_te: (T, N) to (T, N)."""
    top_TK, index_TK = logits.topk(highest, dim=-1)
    counted_TK = top_TK.softmax(-1) >= least
    values_TK = logits.softmax(-1).gather(1, index_TK) if softmax else top_TK
    return torch.zeros_like(logits).scatter(1, index_TK, values_TK * counted_TK)


class MaskedLogits(Collector):
    """Also sums up z'."""

    highest, least, softmax = 1, -1.0, False

    def update(self, seen: Seen, real_T: Tensor, keys_T: Tensor, per_token_T: Tensor) -> None:
        super().update(seen, real_T, keys_T, per_token_T)
        logits_TN = seen.triple.router_logits[real_T].double()
        masked_TN = masked_logits(logits_TN, self.highest, self.least, softmax=self.softmax)
        self.scatter_rows(SUM, self.order[seen.layer.name], keys_T, masked_TN)


def collect(
    model: Any, batches: Iterable[Batch], labels: Sequence[str], *, highest: int = 1, least: float = -1.0,
    softmax: bool = False, num_folds: int = 10, fingerprint: str = "",
) -> ExpertStats:  # fmt: skip
    """Statistics that hold the sum this ranking needs, beside all sums of routing.

    highest     K_a
    least       r; below 0 it bars nothing
    """
    layers = open_layers(model)
    if not 1 <= highest <= layers[0].num_experts:
        raise UsageError(
            "a token has no so many highest experts", expected=f"1 to {layers[0].num_experts}", received=highest
        )
    collector = MaskedLogits(model, layers, labels, num_folds=num_folds, fingerprint=fingerprint)
    collector.highest, collector.least, collector.softmax = highest, least, softmax
    return read(collector, batches)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of(SUM, target) / max(stats.num_tokens(target), 1)
