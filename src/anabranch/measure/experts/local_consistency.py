# SPDX-License-Identifier: Apache-2.0
"""Local routing consistency: do neighbouring tokens use the same experts, so that a cache of experts would pay?

Paper     : arXiv 2505.16056 (SRP and SCH).
Equation  : over windows of m tokens, f the activations of an expert in one:  A = sum f,
            TP(a) = sum_{f >= a} f,  P(a) = m #{f >= a},  SRP = max_a 2 TP(a) / (P(a) + A),  rho = P / A at that a
            SCH(rho, m) = hits / choices of a cache of rho K experts a layer, which evicts the one least used in the
            next m tokens.
Shapes    : T tokens, L layers, N experts, K chosen per token, D documents, m tokens of a window, S resamples.
Differs   : intervals come from drawing documents again. Our reading of the cache: it is empty where a document starts,
            whose first token does not count; never evicts what the token needs; of equals, the longest unused goes.
Check     : slow loops; constant routing 1; blocks against the same tokens shuffled
            (tests/measure/experts/test_local_consistency.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace

WINDOW = 16


@dataclass(frozen=True, eq=False)
class Consistency:
    """Of a whole model, with the interval that documents leave open, and of its parts."""

    overall: float
    low: float
    high: float
    by_layer: Tensor  # (L,)
    by_expert: Tensor | None = None
    """(L, N), of SRP; NaN where an expert was never used."""
    cache_factor: float = math.nan
    """rho of SRP: experts that the best prediction holds, per expert that is used."""
    skipped: int = 0
    """Documents too short to say anything."""


def srp(
    trace: RoutingTrace, window: int = WINDOW, *, num_resamples: int = 1000, generator: torch.Generator | None = None
) -> Consistency:
    """Segment routing best performance: 1 where windows use an expert for all of their tokens or for none."""
    documents = long_enough(trace, window)
    by_expert_LNF = torch.zeros(len(trace.layers), trace.num_experts, window + 1, dtype=torch.float64)
    by_document = []
    for document in documents:
        own_LNF = histogram(document, window, trace.num_experts)
        by_expert_LNF += own_LNF
        by_document.append(own_LNF.sum(1))
    by_document_DLF = torch.stack(by_document)
    overall, cache_factor = best_f1(by_document_DLF.sum((0, 1)))
    draws_SD = resamples(len(documents), num_resamples, generator)
    drawn_S = best_f1(draws_SD @ by_document_DLF.sum(1))[0]
    return Consistency(
        float(overall), *limits(drawn_S), best_f1(by_document_DLF.sum(0))[0], best_f1(by_expert_LNF)[0],
        float(cache_factor), len(list(trace.by_document())) - len(documents),
    )  # fmt: skip


def sch(
    trace: RoutingTrace, window: int = WINDOW, cache_factor: float = 2.0, *, num_resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Consistency:  # fmt: skip
    """Segment cache hit rate of `cache_factor` K experts a layer."""
    K = trace.selected.shape[2]
    size = round(cache_factor * K)
    if size < K:
        raise UsageError("the cache does not hold the experts of one token", expected=f"at least {K}", received=size)
    if window < 1:
        raise UsageError("the cache looks ahead", expected="1 token or more", received=window)
    documents = long_enough(trace, 2)
    hits_DL = cache_hits(documents, trace.num_experts, size, window)
    choices_D = torch.tensor([(len(document) - 1) * K for document in documents], dtype=torch.float64)
    draws_SD = resamples(len(documents), num_resamples, generator)
    drawn_S = (draws_SD @ hits_DL.mean(1)) / (draws_SD @ choices_D)
    by_layer_L = hits_DL.sum(0) / choices_D.sum()
    skipped = len(list(trace.by_document())) - len(documents)
    return Consistency(float(by_layer_L.mean()), *limits(drawn_S), by_layer_L, None, cache_factor, skipped)


def long_enough(trace: RoutingTrace, least: int) -> list[Tensor]:
    documents = [document.long() for document in trace.by_document() if len(document) >= least]
    if least < 1 or not documents:
        longest = max((len(document) for document in trace.by_document()), default=0)
        raise UsageError("no document is as long as a window", expected=f"1 to {longest} tokens", received=least)
    return documents


def histogram(document: Tensor, window: int, num_experts: int) -> Tensor:
    """(L, N, m + 1): windows by how often they use the expert; (T, L, K) of one document."""
    T, L, _ = document.shape
    active_TLN = torch.zeros(T + 1, L, num_experts, dtype=torch.int64)
    active_TLN[1:].scatter_(2, document, 1)
    sums_TLN = active_TLN.cumsum(0)
    used_WLN = sums_TLN[window:] - sums_TLN[:-window]
    cells = used_WLN + (window + 1) * torch.arange(L * num_experts).view(L, num_experts)
    counts = torch.bincount(cells.flatten(), minlength=L * num_experts * (window + 1))
    return counts.view(L, num_experts, window + 1).double()


def best_f1(histogram_F: Tensor) -> tuple[Tensor, Tensor]:
    """max_a 2 TP(a) / (P(a) + A) and P / A there, over the last dimension: windows with 0 to m activations."""
    window = histogram_F.shape[-1] - 1
    times_F = torch.arange(window + 1, dtype=torch.float64)
    true_F = (histogram_F * times_F).flip(-1).cumsum(-1).flip(-1)[..., 1:]  # a from 1: of 0 says "always"
    predicted_F = window * histogram_F.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    used = true_F[..., :1]
    f1, best = (2 * true_F / (predicted_F + used)).max(-1)
    return f1, predicted_F.gather(-1, best[..., None]).squeeze(-1) / used.squeeze(-1)


def cache_hits(documents: list[Tensor], num_experts: int, size: int, window: int) -> Tensor:
    """(D, L) float64: choices after the first token that found their expert in the cache."""
    lengths_D = torch.tensor([len(document) for document in documents])
    padded_TDLK = torch.nn.utils.rnn.pad_sequence(documents)
    T, D, L, _ = padded_TDLK.shape
    active_TDLN = torch.zeros(T, D, L, num_experts, dtype=torch.bool).scatter_(3, padded_TDLK, True)
    active_TDLN &= (torch.arange(T)[:, None] < lengths_D)[..., None, None]
    cached_DLN = torch.zeros(D, L, num_experts, dtype=torch.bool)
    ahead_DLN = active_TDLN[:window].sum(0)
    last_DLN, hits_DL = torch.zeros(D, L, num_experts, dtype=torch.int64), torch.zeros(D, L, dtype=torch.float64)
    for t in range(T):
        active_DLN = active_TDLN[t]
        if t:
            hits_DL += (cached_DLN & active_DLN).sum(-1)
        ahead_DLN = ahead_DLN - active_DLN.long()
        if t + window < T:
            ahead_DLN += active_TDLN[t + window]
        last_DLN[active_DLN] = t
        worth_DLN = (ahead_DLN * (T + 1) + last_DLN).masked_fill(active_DLN, torch.iinfo(torch.int64).max)
        worth_DLN = worth_DLN.masked_fill(~(cached_DLN | active_DLN), -1)
        order_DLN = worth_DLN.sort(dim=-1, descending=True, stable=True).indices[..., :size]
        cached_DLN = torch.zeros_like(cached_DLN).scatter_(-1, order_DLN, True) & (worth_DLN >= 0)
    return hits_DL


def resamples(num_documents: int, num_resamples: int, generator: torch.Generator | None) -> Tensor:
    """(S, D) float64: how often each document is drawn."""
    generator = generator or torch.Generator().manual_seed(0)
    drawn_SD = torch.randint(num_documents, (num_resamples, num_documents), generator=generator)
    ones = torch.ones(drawn_SD.shape, dtype=torch.float64)
    return torch.zeros(drawn_SD.shape, dtype=torch.float64).scatter_add_(1, drawn_SD, ones)


def limits(drawn_S: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(drawn_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
