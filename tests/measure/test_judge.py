# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.concept_ratio import wilson
from anabranch.measure.judge import agreement, calibrate, correct


def lists(table):
    """Answers of two judges with this table of counts: [[yes yes, yes no], [no yes, no no]]."""
    cells = [(a, b, count) for a, row in zip((1, 0), table, strict=True) for b, count in zip((1, 0), row, strict=True)]
    return [np.concatenate([[cell[side]] * cell[2] for cell in cells]) for side in (0, 1)]


def slow_agreement(first, second):
    n = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(sum(a == value for a in first) / n * sum(b == value for b in second) / n for value in (0, 1))
    return same, (same - chance) / (1 - chance)


def test_a_known_correction_and_one_that_is_clipped():
    found = correct(0.55, 400, (54, 60), (42, 60))
    assert found.rate == pytest.approx(0.4167, abs=5e-5)
    assert found.high - found.rate == pytest.approx(0.155, abs=0.01)
    assert not found.clipped
    assert str(found) == "41.7 % [26.6, 56.7], n = 400 (judge 55.0 %)"
    none = correct(0.30, 400, (54, 60), (42, 60))
    assert (none.rate, none.clipped) == (0, False)
    below = correct(0.25, 400, (54, 60), (42, 60))
    assert (below.rate, below.low, below.clipped) == (0, 0, True)
    assert "clipped" in str(below)


def test_a_perfect_judge_is_left_alone_but_not_trusted_without_end():
    found = correct(0.37, 400, (60, 60), (60, 60))
    assert found.rate == pytest.approx(0.37)
    assert found.high - found.low > wilson(148, 400).high - wilson(148, 400).low


def test_the_corrected_interval_covers_and_the_naive_one_does_not():
    generator = np.random.default_rng(0)
    true, n, anchors, repetitions = 0.40, 400, 60, 4000
    sens, spec = generator.binomial(anchors, 0.9, repetitions), generator.binomial(anchors, 0.7, repetitions)
    yes = generator.binomial(n, true * 0.9 + (1 - true) * 0.3, repetitions)
    corrected, naive = 0, 0
    for k, right_yes, right_no in zip(yes.tolist(), sens.tolist(), spec.tolist(), strict=True):
        found = correct(k / n, n, (right_yes, anchors), (right_no, anchors))
        half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
        corrected += found.low <= true <= found.high
        naive += abs(k / n - true) <= half
    assert corrected / repetitions >= 0.93
    assert naive / repetitions < 0.05


@settings(deadline=None, max_examples=200)
@given(true=st.floats(0, 1), sens=st.integers(36, 60), spec=st.integers(37, 60), n=st.integers(1, 5000))
def test_the_true_rate_comes_back(true, sens, spec, n):
    judged = true * sens / 60 + (1 - true) * (1 - spec / 60)
    found = correct(judged, n, (sens, 60), (spec, 60))
    assert found.rate == pytest.approx(true, abs=1e-9)
    assert 0 <= found.low <= found.rate <= found.high <= 1
    assert not found.clipped


def test_calibration_counts_the_anchors():
    truth, judged = lists([[54, 6], [18, 42]])
    assert calibrate(judged, truth) == ((54, 60), (42, 60))
    assert correct(0.55, 400, *calibrate(judged, truth)) == correct(0.55, 400, (54, 60), (42, 60))


@pytest.mark.parametrize(("table", "kappa"), [([[90, 5], [5, 0]], -0.053), ([[45, 5], [5, 45]], 0.80)])
def test_the_paradox_of_kappa(table, kappa):
    first, second = lists(table)
    found = agreement(first, second)
    assert (found.agreement, found.pabak) == pytest.approx((0.9, 0.8))
    assert found.kappa == pytest.approx(kappa, abs=5e-4)
    assert (found.agreement, found.kappa) == pytest.approx(slow_agreement(first.tolist(), second.tolist()))


def test_two_judges_that_always_say_yes_have_no_kappa():
    assert math.isnan(agreement([1, 1], [1, 1]).kappa)


def test_a_judge_that_knows_too_little_yields_no_number():
    with pytest.raises(UsageError, match=r"knows too little(.|\n)*at least 1.2(.|\n)*0.60 \+ 0.58"):
        correct(0.5, 400, (36, 60), (35, 60))
    assert correct(0.5, 400, (36, 60), (36, 60)).rate == pytest.approx(0.5)  # exactly 1.2 is enough
    with pytest.raises(UsageError, match=r"specificity rests on too few anchors(.|\n)*received: 29"):
        correct(0.5, 400, (60, 60), (29, 29))
    with pytest.raises(ValueError, match=r"sensitivity: expected \(right, of\)"):
        correct(0.5, 400, (61, 60), (60, 60))
    with pytest.raises(ValueError, match=r"rate: expected 0..1 of at least one case, received 1.5"):
        correct(1.5, 400, (60, 60), (60, 60))
