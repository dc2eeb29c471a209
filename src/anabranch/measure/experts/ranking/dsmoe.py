# SPDX-License-Identifier: Apache-2.0
"""DSMoE, domain steering: the experts that a domain's salient tokens are sent to rather than its common ones.

Paper     : DSMoE, domain steering (arXiv 2604.05267).
Equation  : r_i = ||emb_i * dL/d emb_i||_2;  S the tokens of r_i >= eps, C the others;
            score_e = P(e | D) [P(i in S | e) - P(i in C | e)]  =  (count_S,e - count_C,e) / T
Shapes    : L layers, N experts, T tokens of the domain.
Differs   : eps is each document's median unless given. The right-hand side shows why: with fewer than half of the
            tokens in S, the score falls with every use of an expert, and one that is never used is ranked above.
            L is each document's own mean loss, so that batches do not change r.
Check     : counts by hand; r by finite differences (tests/measure/experts/ranking/test_dsmoe.py).
Exempt    : dtype (a token at the median falls on either side by the rounding of the model)
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.measure.experts.ranking.batches import Batch, next_token_losses, read
from anabranch.measure.experts.ranking.contrast import check_contrast, num_tokens, pooled
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import evaluating, open_layers
from anabranch.models.mixtures.routing import Seen

SUM = "saliency"
NEEDS = (SUM,)  # what tells these statistics from those of any two labels
SALIENT, COMMON = "domain tokens", "common tokens"


def saliency(model: Any, batch: Batch) -> Tensor:
    """r_i of every token, 0 for padding: (B, S)."""
    with torch.enable_grad():
        embedded_BSD = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        logits_BSV = model(inputs_embeds=embedded_BSD, attention_mask=batch.attention_mask, use_cache=False).logits
        (slope_BSD,) = torch.autograd.grad(next_token_losses(logits_BSV, batch).sum(), embedded_BSD)
    product_BSD = embedded_BSD.detach().double() * slope_BSD.double()
    saliency_BS: Tensor = product_BSD.norm(dim=-1) * batch.attention_mask.bool()
    if not saliency_BS.isfinite().all():  # compared with a median, NaN would count as common
        raise AnabranchError("the saliency of a token is no number", expected="a model whose loss and gradient are")
    return saliency_BS


def split(saliency: Tensor, of_domain: Tensor, eps: float | None) -> Tensor:
    """(B, S) int64: 0 for the tokens of r_i >= eps, 1 for the others of the domain, -1 for the rest.

    of_domain   (B, S) bool
    """
    if eps is None:
        counts_B1 = of_domain.sum(1, keepdim=True)
        sorted_BS = saliency.masked_fill(~of_domain, torch.inf).sort(1).values
        threshold = sorted_BS.gather(1, (counts_B1 // 2).clamp(max=sorted_BS.shape[1] - 1))
    else:
        threshold = saliency.new_tensor(eps)
    return (saliency < threshold).long().masked_fill(~of_domain, -1)


class Saliencies(Collector):
    """Also sums up r over the tokens that select an expert."""

    current: Tensor  # (B, S), of the batch that is read

    def update(self, seen: Seen, real_T: Tensor, keys_T: Tensor, per_token_T: Tensor) -> None:
        super().update(seen, real_T, keys_T, per_token_T)
        cells_TK = keys_T[:, None] * self.stats.num_experts + seen.triple.selected_experts[real_T]
        r_TK = self.current.reshape(-1)[real_T, None].expand(cells_TK.shape)
        self.scatter(SUM, self.order[seen.layer.name], cells_TK.flatten(), r_TK.flatten())


def collect(
    model: Any, batches: Iterable[Batch], *, eps: float | None = None, num_folds: int = 10, fingerprint: str = ""
) -> ExpertStats:
    """Statistics of the salient and the common tokens of a domain.

    batches     the domain's texts; a token counts where its label is not -1, whichever it is
    """
    layers = open_layers(model)
    collector = Saliencies(model, layers, (SALIENT, COMMON), num_folds=num_folds, fingerprint=fingerprint)

    def labelled() -> Iterator[Batch]:
        for batch in batches:
            own = batch.to(next(model.parameters()).device)
            with evaluating(model):
                collector.current = r_BS = saliency(model, own)
            of_domain_BS = (own.labels >= 0) & own.attention_mask.bool()
            yield Batch(own.input_ids, own.attention_mask, split(r_BS, of_domain_BS, eps), own.folds)

    return read(collector, labelled())


def rank(stats: ExpertStats, target: str = SALIENT, others: Sequence[str] = (COMMON,)) -> Tensor:
    check_contrast(stats, target, others)
    difference_LN = stats.of("count", target) - pooled(stats, "count", others)
    return difference_LN / num_tokens(stats, [target, *others])
