# SPDX-License-Identifier: Apache-2.0
"""Offloading, simulated: a cache of experts for each layer, run over recorded routing; hits, loads, modelled seconds.

Paper     : the common ground of offloading systems; the bound is Belady 1966 (10.1147/sj.52.0078), the rules and the
            count of loads as in MoE-Infinity (arXiv 2401.14361) and ExpertFlow (arXiv 2410.17954).
Equation  : hit rate = hits / (hits + misses),  loads = misses + prefetched,  bytes = loads * expert_bytes,
            seconds = requests * compute + misses * load + sum_requests max(0, prefetched * load - compute),
            load = expert_bytes / bandwidth
Shapes    : T tokens, L layers, S steps; a request is one layer of one step, the set of experts that its tokens need.
Differs   : the experts of a request have to be in the cache together; the cache starts empty and outlives a document.
            Nothing is timed: compute is a constant of one request, a prefetch overlaps with one such constant, and
            demand loads stop everything. The bound is one of loads: prefetching may stall less, never load less.
Check     : textbook sequences by hand; room for all experts leaves first loads only; no rule loads less than Belady's
            on 1,000 drawn traces; LRU has no anomaly (tests/reuse/serve/test_expert_cache.py).
Exempt    : inf (an infinite bandwidth loads in no time); samples (requests are served in their order); experts (of
            those used equally long ago the number decides)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace
from anabranch.reuse.serve.eviction import Ranker, Rule


class Prefetch(Protocol):
    """Names experts before they are asked for, the most likely first; learns what was asked."""

    def want(self, document: int, step: int, layer: int) -> Sequence[int]: ...

    def see(self, document: int, step: int, layer: int, experts: Sequence[int]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the modelled seconds are made of; measure it or state where it is from."""

    expert_bytes: float
    bandwidth: float
    """Bytes a second from where the experts lie to where they run."""
    compute: float
    """Seconds of one request without any load."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"{name} of the machine makes no sense", expected="above 0", received=value)

    @property
    def load(self) -> float:
        return self.expert_bytes / self.bandwidth


class Requests(NamedTuple):
    experts: list[list[tuple[int, ...]]]
    """By layer, by step."""
    documents: list[int]
    """Of every step."""


@dataclass(frozen=True)
class CacheReport:
    capacity: int
    num_tokens: int
    hits: tuple[int, ...]  # L
    misses: tuple[int, ...]  # L
    prefetched: dict[int, int]
    """How many requests had so many experts loaded ahead, used or not."""

    @property
    def hit_rate(self) -> float:
        return sum(self.hits) / max(sum(self.hits) + sum(self.misses), 1)

    @property
    def loads(self) -> int:
        return sum(self.misses) + sum(size * times for size, times in self.prefetched.items())

    @property
    def loads_per_token(self) -> float:
        return self.loads / max(self.num_tokens, 1)

    def bytes(self, machine: Machine) -> float:
        return self.loads * machine.expert_bytes

    def seconds(self, machine: Machine) -> float:
        """By the model in the card; nothing was timed."""
        late = sum(times * max(0.0, size * machine.load - machine.compute) for size, times in self.prefetched.items())
        return sum(self.prefetched.values()) * machine.compute + sum(self.misses) * machine.load + late


def requests(trace: RoutingTrace, tokens_per_step: int = 1) -> Requests:
    """What every layer is asked for: one token a step as in decoding, or several; no step leaves its document."""
    if tokens_per_step < 1:
        raise UsageError("a step has at least one token", expected="1 or more", received=tokens_per_step)
    if not len(trace.selected):
        raise UsageError("the trace is empty", expected="routing of at least one token", received="no token")
    found = Requests([[] for _ in trace.layers], [])
    for document, selected_TLK in enumerate(trace.by_document()):
        for step_TLK in selected_TLK.split(tokens_per_step):
            found.documents.append(document)
            for layer, asked in enumerate(step_TLK.transpose(0, 1).flatten(1).tolist()):
                found.experts[layer].append(tuple(sorted(set(asked))))
    return found


class Cache:
    """One layer's slots."""

    def __init__(self, capacity: int, ranker: Ranker):
        self.capacity, self.ranker = capacity, ranker
        self.held: set[int] = set()

    def fetch(self, experts: Sequence[int], now: int) -> int:
        """Makes these resident, and says how many had to be loaded; `now`: the first step that others are kept for."""
        missing = [expert for expert in dict.fromkeys(experts) if expert not in self.held]
        free = self.capacity - len(self.held)
        if len(missing) > free:
            others = sorted(self.held.difference(experts))
            others.sort(key=lambda expert: self.ranker.rank(expert, now))  # stable: of equals, the lower index goes
            self.held.difference_update(others[: len(missing) - free])
        self.held.update(missing)
        return len(missing)


def simulate(
    trace: RoutingTrace, capacity: int, rule: Rule, *, prefetch: Prefetch | None = None, tokens_per_step: int = 1
) -> CacheReport:
    """One cache of `capacity` experts for each layer, over the whole trace.

    Raises:
        UsageError: the cache is too small to hold the experts of some request together.
    """
    asked = requests(trace, tokens_per_step)
    most = max(len(experts) for layer in asked.experts for experts in layer)
    if capacity < most:
        raise UsageError(
            "the cache can't hold what one step of a layer needs", expected=f"at least {most} experts",
            received=capacity, hint="fewer tokens in a step, or more room",
        )  # fmt: skip
    caches = [Cache(capacity, rule(layer, experts)) for layer, experts in enumerate(asked.experts)]
    misses, total, sizes = [0] * len(caches), [0] * len(caches), Counter[int]()
    for step, document in enumerate(asked.documents):
        for layer, cache in enumerate(caches):
            needed = asked.experts[layer][step]
            wanted = list(prefetch.want(document, step, layer))[:capacity] if prefetch else []
            sizes[cache.fetch(wanted, step)] += 1
            misses[layer] += cache.fetch(needed, step + 1)
            total[layer] += len(needed)
            cache.ranker.see(step, needed)
            if prefetch:
                prefetch.see(document, step, layer, needed)
    hits = tuple(asked_for - missed for asked_for, missed in zip(total, misses, strict=True))
    return CacheReport(capacity, len(trace.selected), hits, tuple(misses), dict(sizes))
