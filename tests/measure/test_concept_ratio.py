# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anabranch.measure.concept_ratio import (
    continuity_phi,
    inappropriateness,
    mcnemar,
    over_seeds,
    paired_difference,
    ratio,
    wilson,
)
from anabranch.measure.intervals import interval

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def arms(both, first_only, second_only, neither):
    """Two lists of hits with this fourfold table."""
    first = [1] * both + [1] * first_only + [0] * second_only + [0] * neither
    second = [1] * both + [0] * first_only + [1] * second_only + [0] * neither
    return np.array(first), np.array(second)


def slow_mcnemar(first, second):
    """Every way the changed images could have fallen, each as likely; those at most as likely as what was seen."""
    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    seen = sum(a for a, _ in changed)
    splits = [sum(way) for way in itertools.product([0, 1], repeat=len(changed))]
    as_uneven = [split for split in splits if abs(2 * split - len(changed)) >= abs(2 * seen - len(changed))]
    return len(as_uneven) / len(splits)


def test_wilson_solves_its_quadratic_and_prints_per_cent():
    rate = wilson(111, 1000)
    z = stats.norm.ppf(0.975)
    for end in (rate.low, rate.high):
        assert abs(rate.rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 1000))
    assert str(rate) == "11.1 % [9.3, 13.2], n = 1,000"
    assert rate.as_dict()["hits"] == 111


@pytest.mark.parametrize(("hits", "ends"), [(0, (0, 0.0076)), (500, (0.9924, 1))])
def test_none_and_all_have_an_end_that_is_exact(hits, ends):
    rate = wilson(hits, 500)
    assert (rate.low, rate.high) == pytest.approx(ends, abs=1e-4)
    assert rate.low == 0 or rate.high == 1


def test_the_interval_covers_a_known_rate():
    hits = np.random.default_rng(0).binomial(200, 0.11, 4000)
    covered = {k: wilson(int(k), 200).low <= 0.11 <= wilson(int(k), 200).high for k in np.unique(hits)}
    assert np.mean([covered[k] for k in hits]) == pytest.approx(0.95, abs=0.015)


def test_a_detector_on_clean_and_on_planted_images_gives_its_false_positive_rate_and_its_recall():
    generator = torch.Generator().manual_seed(0)
    planted = torch.rand(1000, generator=generator) < 0.7
    fires = torch.where(planted, torch.rand(1000, generator=generator) < 0.8, torch.tensor(False))
    assert ratio(fires[~planted]).rate == 0
    assert ratio(fires[planted]).rate == (fires & planted).sum().item() / planted.sum().item()


def test_newcombes_published_example():
    found = paired_difference(*arms(36, 12, 2, 0))
    assert (found.difference, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert found.verdict == "positive"
    assert str(found) == "+20.0 points [+5.7, +34.0], n = 50"


def test_a_positive_phi_is_lowered_by_half_an_image():
    assert continuity_phi(20, 3, 1, 16) == pytest.approx((320 - 3 - 20) / math.sqrt(23 * 17 * 21 * 19))
    assert continuity_phi(2, 2, 1, 2) == 0  # never below zero by the correction alone
    assert continuity_phi(1, 3, 4, 2) == pytest.approx(-10 / math.sqrt(4 * 6 * 5 * 5))
    assert continuity_phi(0, 5, 0, 5) == 0  # the second model never shows it


def test_a_model_paired_with_itself_differs_by_nothing():
    hits = arms(150, 0, 0, 350)[0]
    found = paired_difference(hits, hits)
    assert (found.difference, found.p_value, found.verdict) == (0, 1, "open")
    assert found.high < 0.01


def test_pairing_sees_what_two_apart_would_not():
    first, second = arms(150, 15, 1, 334)
    assert ratio(first).low < ratio(second).rate
    assert paired_difference(first, second).verdict == "positive"


def test_the_paired_interval_covers():
    generator = np.random.default_rng(0)
    shown = generator.random((2000, 200)) < 0.3
    kept = shown & (generator.random((2000, 200)) < 0.6)
    found = [paired_difference(a, b) for a, b in zip(shown, kept, strict=True)]
    assert np.mean([one.low <= 0.12 <= one.high for one in found]) > 0.94


@settings(deadline=None, max_examples=200)
@given(PAIRS)
def test_an_interval_holds_its_difference_and_turns_with_the_arms(pairs):
    first, second = np.array(pairs).T
    found, turned = paired_difference(first, second), paired_difference(second, first)
    assert -1 - 1e-9 <= found.low <= found.difference <= found.high <= 1 + 1e-9
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert turned.p_value == pytest.approx(found.p_value)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=10))
def test_mcnemar_is_the_count_of_all_ways(pairs):
    first, second = np.array(pairs).T
    assert mcnemar(first, second) == pytest.approx(slow_mcnemar(first.tolist(), second.tolist()))


def test_seeds_have_a_t_interval():
    rates = [wilson(k, 500) for k in (45, 34, 50)]
    assert over_seeds(rates) == interval([0.09, 0.068, 0.1])


def test_inappropriateness_of_a_hand_made_table():
    flagged = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = inappropriateness(
        flagged, [("violence", "hate"), ("hate",), (), ("violence",)], np.random.default_rng(0), draw_size=2
    )
    assert found.overall.rate == 7 / 16
    assert {name: (rate.hits, rate.count) for name, rate in found.categories.items()} == {
        "hate": (5, 8),
        "violence": (6, 8),
    }
    draws = [max(a, b) for a, b in itertools.product((1, 0.25, 0, 0.5), repeat=2)]
    assert found.expected_maximum == pytest.approx(np.mean(draws), abs=0.01)
    assert found.expected_maximum_sd == pytest.approx(np.std(draws), abs=0.01)


def test_draws_follow_the_generator():
    flagged = np.random.default_rng(1).random((60, 10)) < 0.3
    again = [inappropriateness(flagged, [()] * 60, np.random.default_rng(seed), 50) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match=r"expected 0\.\.n of at least one image, received 0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="hits: expected a non-empty list of 0 or 1"):
        ratio([])
    with pytest.raises(ValueError, match="hits: expected a non-empty list of 0 or 1"):
        ratio([0, 1, 0.5])
    with pytest.raises(ValueError, match="second_hits: expected 2, one for each of first_hits, received 1"):
        mcnemar([0, 1], [0])
    with pytest.raises(ValueError, match=r"flagged: expected \(3 prompts, images\), received \(2, 2\)"):
        inappropriateness([[0, 1], [1, 1]], [(), (), ()], np.random.default_rng(0))
