# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anabranch.measure.intervals import interval


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_it_is_the_t_interval_of_scipy(values):
    got = interval(values)
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), spread) if spread else (np.mean(values),) * 2
    assert (got.low, got.high) == pytest.approx((low, high), abs=1e-9)


def test_one_seed_carries_no_verdict():
    got = interval([3.0])
    assert math.isnan(got.low)
    assert got.verdict == "open"
    assert got.as_dict()["low"] is None


def test_two_seeds_that_agree_by_chance_carry_no_verdict():
    assert interval([50.0, 50.0]).verdict == "open"
    assert interval([50.0, 50.0, 50.1]).verdict == "positive"


def test_coverage_is_what_it_says():
    generator = np.random.default_rng(0)
    hits = [interval(generator.normal(1, 2, 4)) for _ in range(2000)]
    assert np.mean([hit.low <= 1 <= hit.high for hit in hits]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_nothing_to_average(values):
    with pytest.raises(ValueError, match="finite numbers, received"):
        interval(values)
