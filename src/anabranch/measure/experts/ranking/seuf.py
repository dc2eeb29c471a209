# SPDX-License-Identifier: Apache-2.0
"""SEUF, attribution step: the one expert, over all layers, that the forget set's routers put most probability on.

Paper     : SEUF (arXiv 2411.18797).
Equation  : s_e = mean over documents j of (1 / L_j) sum_{t in j} g_te,  g = softmax(z)
Shapes    : L layers, N experts, L_j tokens of document j; a layer's sum is 1 where all tokens bear the label.
Differs   : g is the whole row of the softmax, not the combine weights of the chosen, also in families whose gate is a
            sigmoid: so layers with and without normalised weights compare.
Check     : rows by hand; a long document counts as much as a short one, which the mean over tokens does not keep
            (tests/measure/experts/ranking/test_seuf.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from anabranch.measure.experts.ranking.batches import Batch, read
from anabranch.measure.experts.ranking.contrast import num_documents
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import open_layers
from anabranch.models.mixtures.routing import Seen

SUM = "document_probability"
NEEDS = (SUM,)


class DocumentMeans(Collector):
    """Also sums up softmax(z) / L_j."""

    def update(self, seen: Seen, real_T: Tensor, keys_T: Tensor, per_token_T: Tensor) -> None:
        super().update(seen, real_T, keys_T, per_token_T)
        probs_TN = seen.triple.router_logits[real_T].double().softmax(-1)
        self.scatter_rows(SUM, self.order[seen.layer.name], keys_T, probs_TN * per_token_T[:, None])


def collect(
    model: Any, batches: Iterable[Batch], labels: Sequence[str], *, num_folds: int = 10, fingerprint: str = ""
) -> ExpertStats:
    """Statistics that hold the sum this ranking needs, beside all sums of routing."""
    layers = open_layers(model)
    return read(DocumentMeans(model, layers, labels, num_folds=num_folds, fingerprint=fingerprint), batches)


def rank(stats: ExpertStats, target: str, others: Sequence[str] = ()) -> Tensor:
    return stats.of(SUM, target) / max(num_documents(stats, [target]), 1)
