# SPDX-License-Identifier: Apache-2.0
"""ExpertFlow, simulated: predict the experts of tokens from their ids, then order tokens and fill caches by that.

Paper     : ExpertFlow (arXiv 2410.17954), from notes on it; its equations were not read.
Equation  : p = sigmoid(f(ids)),  loss = mean of -[y log p + (1 - y) log(1 - p)],  y_tle = 1 where token t chose e;
            scheduler: split T tokens into halves A, B that lower sum_{t in A} H(y_t, c_A) + sum_{t in B} H(y_t, c_B),
            H the Hamming distance, c the majority of each bit in its half;
            cache: of the experts not needed now, the one whose predicted next use is farthest goes
Shapes    : T tokens, S of a document, L layers, N experts, K chosen per token; logits (B, S, L, N).
Differs   : a causal recurrent net in place of the encoder and decoder, so that it may run during decoding. A split is
            kept only if its halves need fewer experts than those that came. With `Ahead` the predicted experts of a
            request are loaded before it, missed ones on demand; when, and by which queue, is not modelled.
Check     : a perfect predictor has exactly the loads of Belady's rule, and none on demand with `Ahead`; a blind one is
            below LRU on local routing and level with it on independent draws; `inverse` restores the old order bit by
            bit (tests/reuse/serve/test_expert_flow.py).
Exempt    : inf (behind an infinite weight a gate is closed or open); samples (tokens of a text have an order); experts
            (the predictor knows experts by their numbers); off (a predictor has no strength)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace
from anabranch.reuse.serve.eviction import Asked, Future, Ranker, Rule
from anabranch.reuse.serve.expert_cache import requests

# the predictor


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    num_layers: int
    num_experts: int
    hidden_size: int = 64


class PathPredictor(nn.Module):
    """Token ids (B, S) to logits (B, S, L, N): which experts each token will choose; no token sees a later one."""

    def __init__(self, config: Config, *, generator: torch.Generator):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.context = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
            self.head = nn.Linear(2 * config.hidden_size, config.num_layers * config.num_experts)
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(config.hidden_size**-0.5), config.hidden_size**-0.5, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        own_BSD = self.embedding(ids)
        context_BSD, _ = self.context(own_BSD)
        logits = self.head(torch.cat((own_BSD, context_BSD), -1))
        return logits.unflatten(-1, (self.config.num_layers, self.config.num_experts))


def paths(trace: RoutingTrace) -> Tensor:
    """y (T, L, N) bool."""
    T, L, _ = trace.selected.shape
    return torch.zeros(T, L, trace.num_experts, dtype=torch.bool).scatter_(2, trace.selected.long(), True)


def documents_of(ids: Tensor, trace: RoutingTrace) -> list[Tensor]:
    """The trace's documents, cut from its token ids (T,)."""
    if len(ids) != len(trace.selected):
        raise UsageError(
            "ids and trace are of different tokens", expected=f"{len(trace.selected)} ids", received=len(ids)
        )
    return list(ids.split([len(part) for part in trace.by_document()]))


def fit(
    predictor: PathPredictor, ids: Tensor, trace: RoutingTrace, *, steps: int = 200, batch_size: int = 16,
    learning_rate: float = 3e-3, generator: torch.Generator,
) -> list[float]:  # fmt: skip
    """Trains on the ids (T,) and the routing of the same tokens; returns the loss of every step."""
    texts = documents_of(ids, trace)
    targets = paths(trace).float().split([len(text) for text in texts])
    optimizer = torch.optim.Adam(predictor.parameters(), learning_rate)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(texts), generator=generator)[:batch_size].tolist()
        ids_BS = nn.utils.rnn.pad_sequence([texts[row] for row in rows], batch_first=True)
        real_BS = nn.utils.rnn.pad_sequence([torch.ones(len(texts[row])).bool() for row in rows], batch_first=True)
        logits_TLN, target_TLN = predictor(ids_BS)[real_BS], torch.cat([targets[row] for row in rows])
        loss = nn.functional.binary_cross_entropy_with_logits(logits_TLN, target_TLN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def predicted(predictor: PathPredictor, ids: Tensor, trace: RoutingTrace) -> RoutingTrace:
    """The K likeliest experts of every token and layer, as a trace; of the given one only the documents are read."""
    logits_TLN = torch.cat([predictor(text[None])[0] for text in documents_of(ids, trace)])
    selected_TLK = logits_TLN.topk(trace.selected.shape[2], dim=-1).indices
    return RoutingTrace(selected_TLK.to(trace.selected.dtype), trace.documents, trace.num_experts, trace.layers)


def recall(guess: RoutingTrace, trace: RoutingTrace) -> float:
    """Share of the chosen experts that were predicted; K / N by chance."""
    found_TLN, chosen_TLN = paths(guess), paths(trace)
    return float((found_TLN & chosen_TLN).sum() / chosen_TLN.sum())


# the scheduler


class Schedule(NamedTuple):
    """Two groups: order[:boundary] and order[boundary:]; `x[order][inverse]` is x, bit by bit.

    Sequences that are decoded take their caches along: index those by `order` as well.
    """

    order: Tensor  # (T,) int64
    inverse: Tensor  # (T,) int64
    boundary: int

    @property
    def groups(self) -> tuple[Tensor, Tensor]:
        return self.order[: self.boundary], self.order[self.boundary :]


def schedule(path: Tensor) -> Schedule:
    """Tokens (T, L, N) bool of two batches, regrouped into two of the same size by their predicted paths.

    Which experts a group needs never becomes more than in the order given: else that order is kept.
    """
    bits_TM = path.flatten(1).double()
    T = len(bits_TM)
    if T < 2:
        raise UsageError("too few tokens to group", expected="two or more", received=T)
    given, boundary = torch.arange(T), (T + 1) // 2
    far = int(hamming(bits_TM, bits_TM[:1])[:, 0].argmax())
    centres_2M = bits_TM[[far, int(hamming(bits_TM, bits_TM[far : far + 1])[:, 0].argmax())]]
    order, before = given, float("inf")
    while True:
        distance_T2 = hamming(bits_TM, centres_2M)
        split = (distance_T2[:, 0] - distance_T2[:, 1]).argsort(stable=True)
        total = float(distance_T2[split[:boundary], 0].sum() + distance_T2[split[boundary:], 1].sum())
        if total >= before:
            break
        order, before = split, total
        centres_2M = torch.stack([(bits_TM[half].mean(0) > 0.5).double() for half in order.split(boundary)])
    if experts_needed(path, order.split(boundary)) >= experts_needed(path, given.split(boundary)):
        order = given
    return Schedule(order, order.argsort(), boundary)


def hamming(bits: Tensor, centres: Tensor) -> Tensor:
    """(T, M) and (C, M), of 0 and 1, to (T, C): places that differ."""
    return bits.sum(1, keepdim=True) + centres.sum(1) - 2 * bits @ centres.T


def experts_needed(path: Tensor, groups: Sequence[Tensor]) -> int:
    """Distinct experts of every group and layer, in all."""
    return sum(int(path[group].any(0).sum()) for group in groups)


# the cache


def by_need(guess: RoutingTrace, tokens_per_step: int = 1) -> Rule:
    """Belady's rule on the predicted requests; what was not predicted is loaded on demand."""
    asked = requests(guess, tokens_per_step).experts

    def rule(layer: int, real: Asked) -> Ranker:
        if len(real) != len(asked[layer]):
            raise UsageError(
                "the prediction is of another trace", expected=f"{len(real)} steps", received=len(asked[layer])
            )
        return Future(asked[layer])

    return rule


class Ahead:
    """A `Prefetch`: the predicted experts of a request, right before it."""

    def __init__(self, guess: RoutingTrace, tokens_per_step: int = 1):
        self.asked = requests(guess, tokens_per_step).experts

    def want(self, document: int, step: int, layer: int) -> Sequence[int]:
        return self.asked[layer][step]

    def see(self, document: int, step: int, layer: int, experts: Sequence[int]) -> None:
        """What has run changes no prediction."""
