# SPDX-License-Identifier: Apache-2.0
"""Means with the uncertainty that they carry.

Paper     : Student 1908, "The probable error of a mean".
Equation  : mean +- t(0.975, n - 1) * sd / sqrt(n), sd with n - 1 in the denominator.
Shapes    : n independent repetitions (seeds); differences are paired by seed before they come here.
Differs   : nothing. One repetition has no interval: low and high are NaN, and no verdict follows from it.
Check     : equals scipy.stats.t.interval (tests/measure/test_intervals.py).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

ENOUGH = 3
"""Seeds that a verdict needs."""


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds with its 95 % t-interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """`positive` or `negative` when the interval of at least three seeds excludes zero, else `open`."""
        if self.count < ENOUGH:
            return "open"  # two seeds that agree by chance would have an interval of no width
        return "positive" if self.low > 0 else "negative" if self.high < 0 else "open"

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """mean +- t(0.975, n - 1) * sd / sqrt(n).

    Raises:
        ValueError: no values, or a value that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError(f"values: expected a non-empty list of finite numbers, received {values!r}")
    mean = float(sample.mean())
    if len(sample) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return Interval(mean, mean - half, mean + half, len(sample))
