# SPDX-License-Identifier: Apache-2.0
"""What is a judge's number worth? A rate corrected for the errors that a judge or detector makes on known cases.

Paper     : Rogan and Gladen 1978, "Estimating prevalence from the results of a screening test"; Cohen 1960 (kappa);
            Byrt, Bishop and Carlin 1993 (PABAK); for language models as judges cf. arXiv 2511.21140.
Equation  : pi = (q + spec - 1) / (sens + spec - 1),  q = the judge's yes-rate on n cases;
            var = [q (1 - q) / n + (1 - pi)^2 spec (1 - spec) / n0 + pi^2 sens (1 - sens) / n1] / (sens + spec - 1)^2;
            kappa = (agreement - chance) / (1 - chance);  PABAK = 2 agreement - 1.
Shapes    : sens = P(yes | true yes) from n1 anchors, spec = P(no | true no) from n0; counts come as (right, of).
Differs   : in the variance alone each share gets one hit and one miss more, so that a judge without an error on its
            anchors is not taken for perfect. Estimate sens and spec apart for each family of models it judges.
Check     : q .55, sens .9, spec .7 give .4167; at a true rate of .40 the interval covers in at least .93 of 4,000
            repetitions, that of the uncorrected rate in under .05 (tests/measure/test_judge.py).
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import UsageError
from anabranch.measure.concept_ratio import paired

NORMAL_95 = 1.959963984540054
LEAST_INFORMATION = 1.2
"""Of sens + spec; a coin has 1."""
LEAST_ANCHORS = 30


class Calibration(NamedTuple):
    """(right, of) on the anchors that are truly yes, and on those that are truly no."""

    sensitivity: tuple[int, int]
    specificity: tuple[int, int]


@dataclass(frozen=True)
class Corrected:
    """The rate a perfect judge would have found, in 0..1, with its 95 % interval."""

    rate: float
    low: float
    high: float
    judged: float
    """The judge's own rate."""
    count: int
    clipped: bool
    """The estimate fell outside 0..1 and was moved to the border: the judge was wrong otherwise than on its anchors."""

    def as_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)

    def __str__(self) -> str:
        ends = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        moved = ", clipped" if self.clipped else ""
        return f"{100 * self.rate:.1f} % {ends}, n = {self.count:,} (judge {100 * self.judged:.1f} %{moved})"


@dataclass(frozen=True)
class Agreement:
    """How far two judges say the same. Read all three: kappa is low when nearly every answer is the same."""

    agreement: float
    kappa: float
    """NaN when both give one and the same answer throughout."""
    pabak: float
    count: int


def calibrate(judged: ArrayLike, truth: ArrayLike) -> Calibration:
    """Counts of a judge against humans, both (N,) of 0 or 1, for `correct(rate, n, *calibrate(judged, truth))`."""
    said, known = paired(judged, truth)
    yes, no = int(known.sum()), int((~known).sum())
    return Calibration((int((said & known).sum()), yes), (int((~said & ~known).sum()), no))


def share(right_of: tuple[int, int], name: str) -> float:
    right, count = right_of
    if not 0 <= right <= count:
        raise ValueError(f"{name}: expected (right, of) with right in 0..of, received {right_of}")
    if count < LEAST_ANCHORS:
        raise UsageError(
            f"{name} rests on too few anchors", expected=f"at least {LEAST_ANCHORS}", received=count, hint="label more"
        )
    return right / count


def spread(p: float, n: int) -> float:
    """p (1 - p) / n after one hit and one miss more."""
    smooth = (p * n + 1) / (n + 2)
    return smooth * (1 - smooth) / n


def correct(rate: float, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int]) -> Corrected:
    """pi = (q + spec - 1) / (sens + spec - 1), clipped to 0..1 and said so.

    Raises:
        UsageError: sens + spec below 1.2, or fewer than 30 anchors of a kind: such a judge yields no number.
    """
    if not 0 <= rate <= 1 or n < 1:
        raise ValueError(f"rate: expected 0..1 of at least one case, received {rate} of {n}")
    sens, spec = share(sensitivity, "sensitivity"), share(specificity, "specificity")
    information = sens + spec - 1
    if information < LEAST_INFORMATION - 1:
        raise UsageError(
            "the judge knows too little for a correction",
            expected=f"sensitivity + specificity of at least {LEAST_INFORMATION}",
            received=f"{sens:.2f} + {spec:.2f}",
            hint="another judge, a better threshold, or count by hand",
        )
    pi = (rate + spec - 1) / information
    variance = (
        spread(rate, n) + (1 - pi) ** 2 * spread(spec, specificity[1]) + pi**2 * spread(sens, sensitivity[1])
    ) / information**2
    half = NORMAL_95 * math.sqrt(variance)
    low, inside, high = (min(max(value, 0.0), 1.0) for value in (pi - half, pi, pi + half))
    outside = pi < -1e-12 or pi > 1 + 1e-12  # a rounding error is not a clip
    return Corrected(inside, low, high, rate, n, outside)


def agreement(first: ArrayLike, second: ArrayLike) -> Agreement:
    """kappa = (agreement - chance) / (1 - chance) of two lists (N,) of 0 or 1, and its companions."""
    a, b = paired(first, second)
    same = float(np.mean(a == b))
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    kappa = (same - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(same, kappa, 2 * same - 1, len(a))
