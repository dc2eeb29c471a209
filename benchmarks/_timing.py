# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: every case runs once a round in random order, so that a busy moment hits all of them alike."""

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    median: float
    """Median over rounds of (time of the case / time of the reference in the same round)."""
    seconds: float
    """Median over rounds of the case's own time."""


def compare(
    cases: dict[str, Callable[[], object]], reference: str, rounds: int = 7, warmup: int = 2, seed: int = 0
) -> dict[str, Ratio]:
    """Time all cases against the one named `reference`, which belongs to `cases` and gets 1.0."""
    if reference not in cases:
        raise ValueError(f"reference: expected one of {', '.join(cases)}, received {reference}")
    shuffler = random.Random(seed)
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shuffler.shuffle(names)
        for name in names:
            start = time.perf_counter()
            cases[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Ratio(
            statistics.median(own / base for own, base in zip(seconds[name], seconds[reference], strict=True)),
            statistics.median(seconds[name]),
        )
        for name in cases
    }
