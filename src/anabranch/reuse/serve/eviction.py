# SPDX-License-Identifier: Apache-2.0
"""Who leaves a full cache: each rule ranks the experts, and the lowest of those not needed now goes.

    rule(layer, asked) -> Ranker            one for each layer; asked: the experts of every step, in order
    Ranker.see(step, experts)               the step's experts have run
    Ranker.rank(expert, now)                what keeping it is worth to the steps from `now` on; compared only

`lru`, `lfu`, `drawn` and `by_frequency` do not look at what is asked in future; `belady` and `window` do.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace

Asked = Sequence[tuple[int, ...]]


class Ranker(Protocol):
    def see(self, step: int, experts: Sequence[int]) -> None: ...

    def rank(self, expert: int, now: int) -> Any: ...


Rule = Callable[[int, Asked], Ranker]


class Past:
    """What has run: times and the last step, of all steps and not only while in the cache."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()
        self.last: defaultdict[int, int] = defaultdict(lambda: -1)

    def see(self, step: int, experts: Sequence[int]) -> None:
        self.times.update(experts)
        self.last.update(dict.fromkeys(experts, step))


class Lru(Past):
    def rank(self, expert: int, now: int) -> int:
        return self.last[expert]


class Lfu(Past):
    def rank(self, expert: int, now: int) -> tuple[int, int]:
        return self.times[expert], self.last[expert]


class Fixed(Past):
    def __init__(self, values: Sequence[float]):
        super().__init__()
        self.values = values

    def rank(self, expert: int, now: int) -> tuple[float, int]:
        return self.values[expert], self.last[expert]


class Drawn(Past):
    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def rank(self, expert: int, now: int) -> float:
        return float(torch.rand((), generator=self.generator))


class Future(Past):
    """Knows what is asked: of every expert, the steps that need it."""

    def __init__(self, asked: Asked):
        super().__init__()
        self.uses: defaultdict[int, list[int]] = defaultdict(list)
        for step, experts in enumerate(asked):
            for expert in experts:
                self.uses[expert].append(step)

    def rank(self, expert: int, now: int) -> Any:
        """The nearer the next use, the higher."""
        uses = self.uses[expert]
        first = bisect_left(uses, now)
        return -(uses[first] if first < len(uses) else math.inf)


class Window(Future):
    def __init__(self, asked: Asked, reach: int):
        super().__init__(asked)
        self.reach = reach

    def rank(self, expert: int, now: int) -> Any:
        uses = self.uses[expert]
        return bisect_left(uses, now + self.reach) - bisect_left(uses, now), self.last[expert]


def lru(layer: int, asked: Asked) -> Ranker:
    """The one that was not needed for longest goes."""
    return Lru()


def lfu(layer: int, asked: Asked) -> Ranker:
    """The one needed in the fewest steps so far goes; of equals, the one not needed for longest."""
    return Lfu()


def belady(layer: int, asked: Asked) -> Ranker:
    """The one needed again last goes: with the future known, no rule loads less."""
    return Future(asked)


def window(reach: int) -> Rule:
    """The one needed in the fewest of the next `reach` steps goes, of equals the one not needed for longest.

    The cache of `anabranch.measure.experts.local_consistency.sch`, here one that outlives documents.
    """
    if reach < 1:
        raise UsageError("a cache that looks ahead sees at least one step", expected="1 or more", received=reach)
    return lambda layer, asked: Window(asked, reach)


def by_frequency(calibration: RoutingTrace) -> Rule:
    """The one that is rarest in another trace of the model goes."""
    times_L = [
        torch.bincount(calibration.selected[:, layer].flatten().long(), minlength=calibration.num_experts).tolist()
        for layer in range(len(calibration.layers))
    ]
    return lambda layer, asked: Fixed(times_L[layer])


def drawn(generator: torch.Generator) -> Rule:
    """Any one goes: the floor that a rule has to beat."""
    return lambda layer, asked: Drawn(generator)
