# SPDX-License-Identifier: Apache-2.0
"""Prefetch of experts by the nearest stored request: what ran in a request like this one will run here.

Paper     : the idea of MoE-Infinity, Xue et al. (arXiv 2401.14361); no equation of the paper was read.
Equation  : A_le = steps so far in which this request needed expert e in layer l;
            r* = argmax_r cos(A, A_r) over the stored requests;  wanted in layer l: the k highest of A_r*[l] above 0
Shapes    : R stored requests, L layers, N experts, k wanted; a request is a document of the trace.
Differs   : the nearest is looked for before every layer; a request that has not run anything yet wants nothing.
            PreviousLayer, beside it: wanted in layer l are the k that most often followed what layer l - 1 just ran.
Check     : similarities by a slow loop; two planted kinds of requests are told apart and misses fall, which they do
            not where histories are those of other requests (tests/reuse/serve/test_prefetch.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace
from anabranch.reuse.serve.expert_cache import requests


def histories(trace: RoutingTrace, tokens_per_step: int = 1) -> Tensor:
    """A (R, L, N) of every document of the trace, float64."""
    asked = requests(trace, tokens_per_step)
    counts_RLN = torch.zeros(asked.documents[-1] + 1, len(trace.layers), trace.num_experts).double()
    for layer, steps in enumerate(asked.experts):
        for document, experts in zip(asked.documents, steps, strict=True):
            counts_RLN[document, layer, list(experts)] += 1
    return counts_RLN


def followers(trace: RoutingTrace) -> Tensor:
    """(L - 1, N, N): tokens that chose e in a layer and f in the next."""
    L, N = len(trace.layers), trace.num_experts
    chosen_TLN = torch.zeros(len(trace.selected), L, N).scatter_(2, trace.selected.long(), 1.0).double()
    return torch.einsum("tle,tlf->lef", chosen_TLN[:, :-1], chosen_TLN[:, 1:])


def most_likely(scores: Tensor, count: int) -> list[int]:
    """The `count` highest of (N,) above 0, the highest first; of equals, the lower index."""
    order = scores.argsort(descending=True, stable=True)[:count]
    return order[scores[order] > 0].tolist()


def finite(counts: Tensor) -> Tensor:
    """The highest of NaN would be an expert all the same."""
    if not bool(counts.isfinite().all()):
        raise UsageError("what was recorded is no count", expected="finite numbers", received="NaN or infinity")
    return counts


class NearestHistory:
    """A `Prefetch`; `stored` are histories of requests other than those that it will see."""

    def __init__(self, stored: Tensor, width: int):
        if not len(stored) or width < 1:
            raise UsageError(
                "nothing can be prefetched", expected="stored histories and a width of at least 1",
                received=f"{len(stored)} histories, width {width}",
            )  # fmt: skip
        self.stored, self.width = finite(stored.double()), width
        self.unit_RM = torch.nn.functional.normalize(self.stored.flatten(1), dim=1)
        self.document = -1
        self.cosine_R = torch.zeros(len(stored)).double()  # up to the length of A, which no argmax needs
        self.ran = False

    def want(self, document: int, step: int, layer: int) -> list[int]:
        if document != self.document:
            self.document, self.cosine_R, self.ran = document, torch.zeros_like(self.cosine_R), False
        return most_likely(self.stored[self.nearest(), layer], self.width) if self.ran else []

    def nearest(self) -> int:
        return int(self.cosine_R.argmax())

    def see(self, document: int, step: int, layer: int, experts: Sequence[int]) -> None:
        columns = torch.tensor(experts) + layer * self.stored.shape[2]
        self.cosine_R = self.cosine_R + self.unit_RM[:, columns].sum(1)
        self.ran = True


class PreviousLayer:
    """A `Prefetch` from `followers`; the first layer wants nothing."""

    def __init__(self, following: Tensor, width: int):
        self.following, self.width = finite(following), width
        self.ran: Sequence[int] = ()

    def want(self, document: int, step: int, layer: int) -> list[int]:
        if layer == 0:
            return []
        return most_likely(self.following[layer - 1, list(self.ran)].sum(0), self.width)

    def see(self, document: int, step: int, layer: int, experts: Sequence[int]) -> None:
        self.ran = experts
