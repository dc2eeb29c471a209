# SPDX-License-Identifier: Apache-2.0
"""Routers: which experts see a token or a sample, and how much.

Four slots: score -> adjust* -> select -> weigh.

Equation  : l = score(x or cluster),  l' = (l + sum of the adjustments that reweigh) / temperature,  p = softmax(l'),
            i = select(l + sum of all adjustments),  w = weigh(l', i).
Shapes    : B samples, N tokens in each, R rows routed (R = B or B * N), D width, E experts, K chosen, C clusters.
Rows      : a score stage says what it routes. "token": every token has logits of its own. "sample": logits belong to
            the rows of a table (clusters); the table is decided once per forward, then looked up by the samples' ids,
            so that every token of an image, and every image of a cluster, is treated alike.
Numbers   : everything here is fp32, also under autocast.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Frame, missing_context

Per = Literal["sample", "token"]
Draw = Callable[[Tensor], Tensor]
"""Standard normal noise in the shape of the logits it is given."""


class Routing(NamedTuple):
    """What was decided for R rows."""

    router_logits: Tensor  # (R, E), without noise or other adjustments
    scores: Tensor  # (R, E), probabilities
    selected_experts: Tensor  # (R, K) int64
    routing_weights: Tensor  # (R, K)
    per: Per
    num_samples: int
    mask: Tensor | None = None  # (R,) bool, False: padding

    @property
    def num_experts(self) -> int:
        return self.router_logits.shape[1]

    def rows(self, index: Tensor) -> "Routing":
        """The same decisions for these rows only."""
        logits, scores, selected, weights = (field.index_select(0, index) for field in self[:4])
        return self._replace(
            router_logits=logits,
            scores=scores,
            selected_experts=selected,
            routing_weights=weights,
            num_samples=len(index),
        )

    def choices(self) -> Tensor:
        """(R, E): how often each row chose each expert (0 or 1)."""
        return torch.zeros_like(self.scores).scatter(1, self.selected_experts, 1.0)


class Score(Protocol):
    """First slot. `forward()` gives a table (C, E) per "sample", `forward(hidden_states)` (B, N, E) per "token"."""

    per: Per
    num_experts: int

    def take(self, experts: Sequence[int]) -> nn.Module: ...


class LinearScore(nn.Module):
    """l_t = W x_t: every token by its own hidden state."""

    per: Per = "token"

    def __init__(self, hidden_size: int, num_experts: int, *, generator: torch.Generator):
        super().__init__()
        self.num_experts = num_experts
        self.gate = gate(hidden_size, num_experts, generator)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(at_least_fp32(hidden_states), at_least_fp32(self.gate.weight))

    def take(self, experts: Sequence[int]) -> "LinearScore":
        return with_gate_rows(self, experts)


class TableScore(nn.Module):
    """l_c = W C_c: every sample by the embedding of its cluster.

    `cluster_embedding="centroid"` keeps the table frozen, so that unseen clusters and similar clusters stay meaningful;
    "learned" starts from the table given and trains it.
    """

    per: Per = "sample"

    def __init__(
        self,
        centroids: Tensor,
        num_experts: int,
        *,
        generator: torch.Generator,
        key: str = "cluster",
        cluster_embedding: Literal["centroid", "learned"] = "centroid",
    ):
        super().__init__()
        if cluster_embedding not in ("centroid", "learned"):
            raise ValueError(f"cluster_embedding: expected centroid or learned, received {cluster_embedding}")
        self.key, self.num_experts = key, num_experts
        table_CD = centroids.detach().float().clone()
        self.embedding: Tensor
        if cluster_embedding == "learned":
            self.embedding = nn.Parameter(table_CD)
        else:
            self.register_buffer("embedding", table_CD)
        self.gate = gate(centroids.shape[1], num_experts, generator)

    def forward(self) -> Tensor:
        return nn.functional.linear(at_least_fp32(self.embedding), at_least_fp32(self.gate.weight))

    def take(self, experts: Sequence[int]) -> "TableScore":
        return with_gate_rows(self, experts)


class FixedTable(nn.Module):
    """l_ce = 0 for the expert assigned to cluster c, -inf for the others: nothing is learned, p is one-hot."""

    per: Per = "sample"

    def __init__(self, assignment: Tensor, num_experts: int, *, key: str = "cluster"):
        super().__init__()
        if assignment.min() < 0 or assignment.max() >= num_experts:
            received = f"{int(assignment.min())}..{int(assignment.max())}"
            raise ValueError(f"assignment: expected experts 0..{num_experts - 1}, received {received}")
        self.key, self.num_experts = key, num_experts
        self.assignment: Tensor
        self.register_buffer("assignment", assignment.clone())

    def forward(self) -> Tensor:
        chosen_CE = nn.functional.one_hot(self.assignment, self.num_experts)
        return chosen_CE.float().log()

    def take(self, experts: Sequence[int]) -> "FixedTable":
        kept = torch.as_tensor(experts, device=self.assignment.device)
        matches = self.assignment[:, None] == kept
        if not matches.any(1).all():
            lost = sorted(set(self.assignment[~matches.any(1)].tolist()))
            raise UsageError(f"clusters are assigned to experts {lost}, which would be gone", received=list(experts))
        return FixedTable(matches.int().argmax(1), len(kept), key=self.key)


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 logits drift."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gate(in_features: int, num_experts: int, generator: torch.Generator) -> nn.Linear:
    """W uniform in +-1/sqrt(D), as in nn.Linear, without touching the global generator."""
    linear = nn.Linear(in_features, num_experts, bias=False, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    return linear


Gated = TypeVar("Gated", LinearScore, TableScore)


def with_gate_rows(score: Gated, experts: Sequence[int]) -> Gated:
    taken = copy.deepcopy(score)
    taken.num_experts = taken.gate.out_features = len(experts)
    taken.gate.weight = nn.Parameter(score.gate.weight.detach()[list(experts)])
    return taken


class Adjust(nn.Module):
    """Second slot, any number: a shift (R, E) added to the logits that are *selected* from.

    Weights are computed from the logits without it, unless the stage declares `reweighs`. `draw` is None in eval.
    """

    reweighs = False

    def forward(self, router_logits: Tensor, draw: Draw | None) -> Tensor:
        raise NotImplementedError

    def take(self, experts: Sequence[int]) -> "Adjust":
        """The stage for these experts only; one that keeps something for each expert overrides this."""
        return copy.deepcopy(self)


class GateNoise(Adjust):
    """n ~ N(0, std^2), in training only; std = 1 / E unless given. Reweighs: the noise is part of p."""

    reweighs = True

    def __init__(self, std: float | None = None):
        super().__init__()
        self.std = std

    def forward(self, router_logits: Tensor, draw: Draw | None) -> Tensor:
        std = 1 / router_logits.shape[-1] if self.std is None else self.std
        if draw is None or std == 0:
            return router_logits.new_zeros(())
        return std * draw(router_logits)


class TopK(nn.Module):
    """Third slot: the K highest; of equal ones, the lower index."""

    def __init__(self, top_k: int = 1):
        super().__init__()
        self.top_k = top_k

    def forward(self, router_logits: Tensor) -> Tensor:
        if self.top_k == 1:
            return router_logits.argmax(-1, keepdim=True)
        return router_logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]


def prob(router_logits: Tensor, selected_experts: Tensor) -> Tensor:
    """w = p_i. After a warm start the output shrinks to about 1/E of the trained layer's."""
    return router_logits.softmax(-1).gather(-1, selected_experts)


def straight_through(router_logits: Tensor, selected_experts: Tensor) -> Tensor:
    """w = p_i / stopgrad(p_i): exactly 1 in the forward, while the gradient (that of log p_i) reaches the gate."""
    p_RK = prob(router_logits, selected_experts)
    return p_RK / p_RK.detach().clamp(min=torch.finfo(p_RK.dtype).tiny)


def renormalised(router_logits: Tensor, selected_experts: Tensor) -> Tensor:
    """w = p_i / sum of the selected p. With one expert this is the constant 1, and the gate receives no gradient."""
    return router_logits.gather(-1, selected_experts).softmax(-1)


class Noise:
    """Draws of one forward: for a table, or for the tokens of the whole global batch, so that all ranks agree."""

    def __init__(self, frame: Frame | None, per: Per):
        self.frame, self.per = frame, per
        self.generator: torch.Generator | None = None

    def __call__(self, router_logits: Tensor) -> Tensor:
        if self.frame is None:
            raise missing_context("where its gate noise comes from", "generator=torch.Generator()")
        if self.generator is None:
            self.generator = self.frame.generator()
        shape, rows, batch = router_logits.shape, self.frame.context.rows, self.frame.context.batch
        if self.per == "sample" or rows is None or batch is None:
            return torch.randn(shape, generator=self.generator).to(router_logits)
        return torch.randn(batch, *shape[1:], generator=self.generator)[rows.cpu()].to(router_logits)


Weigh = Callable[[Tensor, Tensor], Tensor]


class Router(nn.Module):
    """score -> adjust* -> select -> weigh."""

    def __init__(
        self,
        score: nn.Module,
        *,
        adjust: Sequence[Adjust] = (),
        select: nn.Module | None = None,
        weigh: Weigh = straight_through,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.score, self.adjust, self.select = score, nn.ModuleList(adjust), select or TopK(1)
        self.weigh, self.temperature = weigh, temperature
        self.check()

    def check(self) -> None:
        top_k = getattr(self.select, "top_k", 1)
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1..num_experts ({self.num_experts}), received {top_k}")
        if self.weigh is straight_through and top_k > 1:
            raise ValueError(f"weigh: expected prob or renormalised with top_k {top_k}, received straight_through")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected > 0, received {self.temperature}")

    @property
    def per(self) -> Per:
        return cast(Score, self.score).per

    @property
    def num_experts(self) -> int:
        return cast(Score, self.score).num_experts

    def forward(self, hidden_states: Tensor, frame: Frame | None) -> Routing:
        with torch.autocast(hidden_states.device.type, enabled=False):
            if self.per == "sample":
                return self.route_samples(hidden_states, frame)
            return self.route_tokens(hidden_states, frame)

    def route_samples(self, hidden_states: Tensor, frame: Frame | None) -> Routing:
        key = str(self.score.key)
        if frame is None:
            raise missing_context(f"the {key} of each sample", f"ids={{{key!r}: ids}}")
        ids = frame.ids(key, len(hidden_states)).to(hidden_states.device)
        table = self.decide(self.score(), self.draw(frame))
        try:
            return table.rows(ids)
        except IndexError as error:
            raise UsageError(
                f"a sample belongs to an unknown {key}",
                expected=f"ids in 0..{len(table.scores) - 1}",
                received=f"ids in {int(ids.min())}..{int(ids.max())}",
            ) from error

    def route_tokens(self, hidden_states: Tensor, frame: Frame | None) -> Routing:
        batch, length = hidden_states.shape[:2]
        logits_BNE = self.score(hidden_states)
        routing = self.decide(logits_BNE, self.draw(frame))
        mask = None if frame is None else frame.mask(batch, length)
        return routing._replace(num_samples=batch, mask=mask)

    def decide(self, router_logits: Tensor, draw: Draw | None) -> Routing:
        """One decision for each row of the logits (..., E), which are flattened to (R, E)."""
        weighed = selected = router_logits
        for stage in self.adjust:
            shift = stage(router_logits, draw)
            selected = selected + shift
            weighed = weighed + shift if stage.reweighs else weighed
        logits_RE, weighed_RE, selected_RE = (x.flatten(0, -2) for x in (router_logits, weighed, selected))
        weighed_RE = weighed_RE / self.temperature
        selected_RK = self.select(selected_RE)
        weights_RK = self.weigh(weighed_RE, selected_RK)
        return Routing(logits_RE, weighed_RE.softmax(-1), selected_RK, weights_RK, self.per, len(logits_RE))

    def draw(self, frame: Frame | None) -> Draw | None:
        training = self.training if frame is None or frame.context.training is None else frame.context.training
        return Noise(frame, self.per) if training else None

    @torch.no_grad()
    def table(self) -> Tensor:
        """(C,) R[c], the first choice of each cluster without noise. Only where rows are samples."""
        if self.per != "sample":
            raise UsageError("a router of tokens has no table: its decision differs from token to token")
        return self.decide(self.score(), None).selected_experts[:, 0]

    def take(self, experts: Sequence[int]) -> "Router":
        """A router over these experts only, in this order; goes with `bank.take`."""
        taken = copy.deepcopy(self)
        taken.score = cast(Score, self.score).take(experts)
        taken.adjust = nn.ModuleList(cast(Adjust, stage).take(experts) for stage in self.adjust)
        taken.check()
        return taken
