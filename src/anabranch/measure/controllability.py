# SPDX-License-Identifier: Apache-2.0
"""Does the word control the concept? Without a handle on it, erasers that work through the word cannot reach it.

Paper     : Geom-Erasing (arXiv 2310.05873), the comparison of "watermark" in the prompt with watermarks in the image.
Equation  : phi = Pearson's r of (word in the prompt, detector fires) over all images, p from Student's t with n - 2.
Shapes    : hits (N,) of 0 or 1 for prompts y, hits (M,) for the same prompts with the concept's word.
Differs   : thresholds are ours. An r whose interval (Fisher's z) still reaches `EXPLICIT` is `unclear`, not
            `implicit`: too few images prove nothing. A concept that never or always shows has no r, and is `unclear`.
Check     : the slow count over the table; a word that decides gives 1 (tests/measure/test_controllability.py).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from anabranch.measure.concept_ratio import Rate, as_hits, ratio

NO_CONTROL, EXPLICIT = 0.1, 0.3
"""|phi| below the first: the word does not move the concept. phi above the second: it does."""
NOT_SHOWN, SHOWN = 0.05, 0.01
"""p above the first: no control was shown. p below the second: it was."""
ADVICE = {
    "implicit": "word-based erasers will not work",
    "explicit": "a word-based eraser is the cheaper choice",
    "unclear": "more images, or a look at them, would tell",
}


@dataclass(frozen=True)
class Controllability:
    """How the concept follows its word, and both rates."""

    phi: float
    low: float
    high: float
    p_value: float
    without_word: Rate
    with_word: Rate

    @property
    def verdict(self) -> str:
        """`implicit`, `explicit` or `unclear`."""
        if math.isnan(self.phi):
            return "unclear"
        if self.phi > EXPLICIT and self.p_value < SHOWN:
            return "explicit"
        unmoved = abs(self.phi) < NO_CONTROL or self.p_value > NOT_SHOWN
        return "implicit" if unmoved and self.high < EXPLICIT else "unclear"

    def __str__(self) -> str:
        found = f"phi {self.phi:+.2f} [{self.low:+.2f}, {self.high:+.2f}], p = {self.p_value:.2g}"
        return f"{self.verdict}: {found}; {ADVICE[self.verdict]}"


def controllability(without_word: ArrayLike, with_word: ArrayLike) -> Controllability:
    """phi = Pearson's r of (word in the prompt, detector fires)."""
    plain, named = as_hits(without_word, "without_word"), as_hits(with_word, "with_word")
    rates = ratio(plain), ratio(named)
    fires = np.concatenate([plain, named]).astype(float)
    if fires.min() == fires.max():
        return Controllability(math.nan, math.nan, math.nan, math.nan, *rates)
    asked = np.repeat([0.0, 1.0], [len(plain), len(named)])
    found = stats.pearsonr(asked, fires)
    low, high = found.confidence_interval()
    return Controllability(float(found.statistic), float(low), float(high), float(found.pvalue), *rates)
