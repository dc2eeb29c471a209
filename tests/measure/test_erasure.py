# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.measure.concept_ratio import wilson
from anabranch.measure.erasure import FOR_REMOVED, FOR_ROBUST, LEVELS, Relearning, steps_to_half, verdict
from anabranch.measure.intervals import interval

COUNT = 500
FLOOR = wilson(2, COUNT)
GONE = wilson(6, COUNT)
BACK = wilson(140, COUNT)
SLOW = Relearning(erased=(90, 110, None), never_saw=(100, 100, 105))
UNREADABLE = interval([0.01, -0.01, 0.0])


def hits(fired):
    return np.arange(COUNT) < fired


def judged(attacks=None, after=6, **changes):
    """An erasure that is perfect but for what is given."""
    tried = dict.fromkeys((*FOR_ROBUST, *FOR_REMOVED), GONE)
    evidence = {"floor": FLOOR, "no_op": hits(150), "relearning": SLOW, "probe": UNREADABLE} | changes
    attacks = tried if attacks is None else attacks
    return verdict(hits(150), hits(after), attacks=attacks, **evidence)


def without(*names, **changed):
    return {name: GONE for name in (*FOR_ROBUST, *FOR_REMOVED) if name not in names} | changed


def slow_steps_to_half(curve, original_rate, parts=400):
    """Walk along the curve in small steps."""
    if curve[0][1] >= original_rate / 2:
        return curve[0][0]
    for (start, low), (stop, high) in itertools.pairwise(curve):
        for part in range(parts + 1):
            if low + (high - low) * part / parts >= original_rate / 2:
                return start + (stop - start) * part / parts
    return None


def test_the_four_levels():
    assert judged().level == "removed"
    assert judged(without(*FOR_REMOVED)).level == "robust"
    assert judged({}).level == "suppressed"
    assert judged(after=150).level == "nothing erased"
    assert not any(found.void for found in (judged(), judged({}), judged(after=150)))


@pytest.mark.parametrize("family", FOR_ROBUST)
def test_each_attack_that_works_or_was_not_tried_leaves_it_suppressed(family):
    back, untried = judged(without(**{family: BACK})), judged(without(family))
    assert {back.level, untried.level} == {"suppressed"}
    assert f"{family} brings it back: 28.0 % [24.2, 32.1], n = 500" in back.reasons
    assert f"{family} was not tried" in untried.reasons


@pytest.mark.parametrize("family", FOR_REMOVED)
def test_each_deeper_attack_leaves_it_robust(family):
    back, untried = judged(without(**{family: BACK})), judged(without(family))
    assert {back.level, untried.level} == {"robust"}
    spared = judged(without(family), inapplicable=[family])
    assert spared.level == "removed"
    assert f"does not apply: {family}" in spared.reasons


def test_one_variant_of_an_attack_is_enough():
    found = judged(without("compression", **{"compression/int8": GONE, "compression/int4": BACK}))
    assert found.level == "suppressed"
    assert "compression/int4 brings it back" in str(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"relearning": Relearning(erased=(10, 12, 9), never_saw=(100, 100, 105))}, "back after 10 steps, in a model"),
        ({"relearning": Relearning(erased=(10, 12, 9), never_saw=(None,) * 3)}, "never saw the concept not in the"),
        ({"relearning": Relearning(erased=(100, 120), never_saw=(100, 100, 105))}, "relearning was not tried on 3"),
        ({"relearning": None}, "relearning was not tried on 3 seeds"),
        ({"probe": interval([0.2, 0.25, 0.22])}, "a probe may still read it"),
        ({"probe": interval([0.2, -0.25, 0.0])}, "a probe may still read it"),  # not shown to be unreadable
        ({"probe": interval([0.0])}, "a probe was not tried on 3 seeds"),
    ],
)
def test_hidden_traces_leave_it_robust(changes, reason):
    found = judged(**changes)
    assert found.level == "robust"
    assert reason in str(found)


def test_an_erasure_that_leaves_more_than_half_is_suppressed_at_best():
    found = judged(after=100)
    assert found.level == "suppressed"
    assert "less than half of the way is gone" in str(found)


def test_few_images_under_attack_count_against_the_eraser():
    assert judged(without(paraphrase=wilson(0, 15))).level == "suppressed"


def test_half_the_way_back_is_counted_from_the_floor():
    """A clean-data model with 7 % false alarms must not fail against 11 % before."""
    before, after = hits(111 * COUNT // 1000), hits(0)
    tried = {name: wilson(710, 10_000) for name in FOR_ROBUST}
    found = verdict(before, after, attacks=tried, floor=wilson(713, 10_000), no_op=before)
    assert found.level == "robust"


def test_an_attack_has_to_draw_more_than_from_a_model_that_never_saw_it():
    """A picture that is hardly noised keeps its mark in any model; one that is noised more loses it in most."""
    tried = without("partial_noise", **{"partial_noise/0.3": wilson(480, COUNT), "partial_noise/0.7": BACK})
    floors = {"partial_noise/0.3": wilson(480, COUNT), "partial_noise/0.7": FLOOR}
    found = judged(tried, floors=floors)
    assert found.level == "robust"
    assert "partial_noise/0.7 brings" in str(found)
    assert "partial_noise/0.3" not in str(found)
    assert "partial_noise/0.3 brings" in str(judged(tried))


def test_controls_void_the_result():
    passes = judged(no_op=hits(20))
    assert passes.void
    assert str(passes).startswith("void: the eraser that does nothing passes: +26.0 points")
    assert judged(floor=wilson(145, COUNT)).void


@settings(deadline=None, max_examples=200)
@given(
    rates=st.lists(st.integers(0, COUNT), min_size=9, max_size=9),
    worse=st.integers(0, 8),
    by=st.integers(1, COUNT),
    after=st.integers(0, COUNT),
)
def test_worse_attacks_never_raise_the_level(rates, worse, by, after):
    names = [*FOR_ROBUST, *FOR_REMOVED]
    tried = dict(zip(names, rates, strict=True))
    more = tried | {names[worse]: min(tried[names[worse]] + by, COUNT)}
    levels = [
        LEVELS.index(judged({name: wilson(k, COUNT) for name, k in some.items()}, after).level)
        for some in (tried, more)
    ]
    assert levels[1] <= levels[0]


def test_steps_to_half():
    curve = [(0, 0.0), (10, 0.1), (20, 0.3), (40, 0.2)]
    assert steps_to_half(curve, 0.4) == pytest.approx(15)
    assert steps_to_half(curve, 0.7) is None
    assert steps_to_half([(5, 0.3), (6, 0.0)], 0.4) == 5


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 40))
def test_steps_to_half_are_those_of_a_slow_walk(rates, original):
    curve = [(10 * step, rate) for step, rate in enumerate(rates)]  # whole numbers: no rounding at the very half
    found, walked = steps_to_half(curve, original), slow_steps_to_half(curve, original)
    assert (found is None) == (walked is None)
    assert found is None or found == pytest.approx(walked, abs=0.05)


def test_wrong_names_and_curves_are_said():
    with pytest.raises(ValueError, match=r"attacks: expected one of .*did you mean paraphrase\?"):
        judged({"paraphrases": GONE})
    with pytest.raises(ValueError, match=r"inapplicable: expected any of .* received \['paraphrase'\]"):
        judged(inapplicable=["paraphrase"])
    with pytest.raises(ValueError, match="curve: expected rising steps"):
        steps_to_half([(1, 0.1), (1, 0.2)], 0.4)
