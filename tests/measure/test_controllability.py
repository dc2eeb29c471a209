# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anabranch.measure.controllability import controllability


def hits(fired, count):
    return np.arange(count) < fired


def slow_phi(plain, named):
    """(n11 n00 - n10 n01) / sqrt of the margins, counted one by one."""
    counts = {(word, fires): 0 for word in (0, 1) for fires in (0, 1)}
    for word, arm in enumerate((plain, named)):
        for fires in arm:
            counts[word, int(fires)] += 1
    n = counts
    margins = len(plain) * len(named) * (n[0, 0] + n[1, 0]) * (n[0, 1] + n[1, 1])
    return (n[1, 1] * n[0, 0] - n[1, 0] * n[0, 1]) / math.sqrt(margins)


def test_a_word_that_decides_gives_one():
    found = controllability(hits(0, 50), hits(50, 50))
    assert found.phi == pytest.approx(1)
    assert found.verdict == "explicit"
    assert "word-based eraser is the cheaper choice" in str(found)


def test_the_papers_watermark_is_implicit():
    """r = -0.08 with p = 0.21 belong to about 245 images."""
    found = controllability(hits(17, 122), hits(11, 123))
    assert found.phi == pytest.approx(-0.08, abs=0.005)
    assert found.p_value == pytest.approx(0.21, abs=0.02)
    t = found.phi * math.sqrt(243 / (1 - found.phi**2))
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(t), 243))
    assert found.verdict == "implicit"
    assert str(found.without_word).startswith("13.9 %")


@pytest.mark.parametrize(
    ("plain", "named", "count", "verdict"),
    [
        (30, 60, 200, "unclear"),  # shown, but weak
        (60, 30, 200, "unclear"),  # the word drives the concept away
        (30, 36, 200, "implicit"),
        (20, 80, 100, "explicit"),
        (1, 1, 5, "unclear"),  # phi is 0 on ten images
        (0, 0, 100, "unclear"),
        (100, 100, 100, "unclear"),
    ],
)
def test_the_verdict_in_a_word(plain, named, count, verdict):
    assert controllability(hits(plain, count), hits(named, count)).verdict == verdict


def test_a_concept_that_never_shows_has_no_correlation():
    assert math.isnan(controllability([0, 0], [0, 0]).phi)


ARM = st.lists(st.booleans(), min_size=2, max_size=40)


@settings(deadline=None, max_examples=200)
@given(ARM, ARM)
def test_it_is_the_slow_count_and_turns_with_the_arms(plain, named):
    if len({*plain, *named}) == 1:
        plain = [not plain[0], *plain[1:]]
    found, turned = controllability(plain, named), controllability(named, plain)
    assert found.phi == pytest.approx(slow_phi(plain, named), abs=1e-9)
    assert turned.phi == pytest.approx(-found.phi, abs=1e-9)
    assert found.low - 1e-9 <= found.phi <= found.high + 1e-9


def test_an_arm_without_images_is_an_error():
    with pytest.raises(ValueError, match="with_word: expected a non-empty list of 0 or 1"):
        controllability([0, 1], [])
