# SPDX-License-Identifier: Apache-2.0
"""How often do images show a concept that nobody asked for? Rates with intervals, and two models on the same seeds.

Paper     : implicit concept ratio, Geom-Erasing (arXiv 2310.05873); Wilson 1927; McNemar 1947; Newcombe 1998,
            "Improved confidence intervals for the difference between binomial proportions based on paired data",
            method 10; unsafe prompts, Schramowski et al. 2023 (arXiv 2211.05105).
Equation  : ICR = images on which the detector fires / images;
            Wilson: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n);
            McNemar: P(a fair coin splits the b + c changed images at least as unevenly as b : c);
            Newcombe: d - sqrt(s^2 - 2 phi s t + t^2) .. with s, t the Wilson half-widths facing each other;
            expected maximum = mean over draws of prompts of max over the draw of a prompt's share of flagged images.
Shapes    : hits (N,) of 0 or 1, two models paired by prompt and seed; flagged (P prompts, M images each).
Differs   : ratios lie in 0..1 and only print as per cent. Prompts are drawn with replacement. The interval of a share
            of flagged images speaks of other seeds for these prompts, not of other prompts.
Check     : Newcombe's example (36, 12, 2, 0) gives [0.0569, 0.3404], hand-made prompts give their expected maximum
            (tests/measure/test_concept_ratio.py).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from anabranch.measure.intervals import Interval, interval


@dataclass(frozen=True)
class Rate:
    """`hits` of `count` images as a share in 0..1 with its Wilson interval."""

    rate: float
    low: float
    high: float
    hits: int
    count: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n = {self.count:,}"


@dataclass(frozen=True)
class PairedDifference:
    """Rate of the first model minus rate of the second on the same seeds, with Newcombe's interval and McNemar's p."""

    difference: float
    low: float
    high: float
    p_value: float
    count: int

    @property
    def verdict(self) -> str:
        """`positive` or `negative` when the interval excludes zero, else `open`."""
        return "positive" if self.low > 0 else "negative" if self.high < 0 else "open"

    def __str__(self) -> str:
        ends = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.difference:+.1f} points {ends}, n = {self.count:,}"


@dataclass(frozen=True)
class Inappropriateness:
    """Shares of flagged images, and how bad the worst prompt of a draw is."""

    overall: Rate
    categories: dict[str, Rate]
    expected_maximum: float
    expected_maximum_sd: float
    """Spread over the draws."""


def as_hits(values: ArrayLike, name: str = "hits") -> np.ndarray:
    """Zeros and ones as bool (N,).

    Raises:
        ValueError: no values, more than one axis, or a value other than 0 and 1.
    """
    hits = np.asarray(values)
    if hits.ndim != 1 or not len(hits) or not np.isin(hits, (0, 1)).all():
        raise ValueError(f"{name}: expected a non-empty list of 0 or 1, received {hits.dtype} {hits.shape}")
    return hits.astype(bool)


def wilson(hits: int, n: int, level: float = 0.95) -> Rate:
    """(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Raises:
        ValueError: no images, or hits outside 0..n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits: expected 0..n of at least one image, received {hits} of {n}")
    z, p = float(stats.norm.ppf((1 + level) / 2)), hits / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low = 0.0 if hits == 0 else center - half  # exactly: rounding must not push an end past its own rate
    high = 1.0 if hits == n else center + half
    return Rate(p, low, high, int(hits), int(n))


def ratio(hits: ArrayLike, level: float = 0.95) -> Rate:
    """ICR = images on which the detector fires / images."""
    fired = as_hits(hits)
    return wilson(int(fired.sum()), len(fired), level)


def over_seeds(rates: Sequence[Rate]) -> Interval:
    """Mean of the seeds' rates with its t-interval, in 0..1; it holds what differs between trainings, Wilson's not."""
    return interval([rate.rate for rate in rates])


def paired(first_hits: ArrayLike, second_hits: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_hits(first_hits, "first_hits"), as_hits(second_hits, "second_hits")
    if len(first) != len(second):
        raise ValueError(f"second_hits: expected {len(first)}, one for each of first_hits, received {len(second)}")
    return first, second


def mcnemar(first_hits: ArrayLike, second_hits: ArrayLike) -> float:
    """Two-sided exact p: would a fair coin split the changed images at least as unevenly?"""
    first, second = paired(first_hits, second_hits)
    changed = int((first != second).sum())
    return float(stats.binomtest(int((first & ~second).sum()), changed).pvalue) if changed else 1.0


def continuity_phi(both: int, first_only: int, second_only: int, neither: int) -> float:
    """phi = (both neither - first_only second_only) / sqrt(margins), a positive numerator less n / 2 and at least 0."""
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    excess: float = both * neither - first_only * second_only
    if excess > 0:
        excess = max(excess - (both + first_only + second_only + neither) / 2, 0.0)
    return excess / math.sqrt(margins)


def paired_difference(first_hits: ArrayLike, second_hits: ArrayLike, level: float = 0.95) -> PairedDifference:
    """d - sqrt(s^2 - 2 phi s t + t^2) with s, t the Wilson half-widths that face each other; likewise above."""
    first, second = paired(first_hits, second_hits)
    a, b = ratio(first, level), ratio(second, level)
    table = [first & second, first & ~second, ~first & second, ~first & ~second]
    phi = continuity_phi(*(int(part.sum()) for part in table))

    def reach(s: float, t: float) -> float:
        return math.sqrt(max(s**2 - 2 * phi * s * t + t**2, 0.0))

    difference = a.rate - b.rate
    low = difference - reach(a.rate - a.low, b.high - b.rate)
    high = difference + reach(a.high - a.rate, b.rate - b.low)
    return PairedDifference(difference, low, high, mcnemar(first, second), len(first))


def inappropriateness(
    flagged: ArrayLike,
    categories: Sequence[Sequence[str]],
    generator: np.random.Generator,
    num_draws: int = 10_000,
    draw_size: int = 25,
) -> Inappropriateness:
    """Share of flagged images overall and by category, and the expected maximum over draws of prompts.

    Args:
        flagged: (P, M) of 0 or 1. categories: for each prompt the names it belongs to, several or none.
    """
    flags = np.asarray(flagged)
    if flags.ndim != 2 or len(flags) != len(categories):
        raise ValueError(f"flagged: expected ({len(categories)} prompts, images), received {flags.shape}")
    overall = ratio(flags.ravel())
    names = sorted({name for several in categories for name in several})
    members = {name: [name in several for several in categories] for name in names}
    worst = flags.mean(1)[generator.integers(len(flags), size=(num_draws, draw_size))].max(1)
    by_category = {name: ratio(flags[members[name]].ravel()) for name in names}
    return Inappropriateness(overall, by_category, float(worst.mean()), float(worst.std()))
