# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.report.text import (
    cell,
    display_width,
    estimate,
    excludes,
    inert,
    interval,
    is_numeric,
    level,
    points,
    shorten,
)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.24, "+3.2"),
        (-0.44, "−0.4"),
        (0.04, "0.0"),
        (-0.04, "0.0"),
        (0, "0.0"),
        (1234.5, "+1,234.5"),
        (np.float32(2.5), "+2.5"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_points_carry_their_sign_and_a_missing_number_is_a_dash(value, shown):
    assert points(value) == shown


def test_intervals_and_estimates_read_as_the_report_prints_them():
    assert interval(1.8, 4.7) == "[+1.8, +4.7]"
    assert interval(-1.25, None, 2) == "[−1.25, –]"
    assert interval(None, float("nan")) == "–"
    assert estimate(3.2, 1.8, 4.7) == "+3.2 [+1.8, +4.7]"
    assert estimate(3.2, None, None) == "+3.2"
    assert estimate(62.6, 60, 64, write=level) == "62.6 [60.0, 64.0]"


def test_only_a_whole_interval_on_one_side_leaves_out_the_centre():
    assert excludes(0.1, 2)
    assert excludes(-2, -0.1)
    assert not excludes(0, 2)
    assert not excludes(0.1, None)
    assert not excludes(float("nan"), -1)
    assert excludes(51, 60, center=50)


def test_cells_print_python_and_array_scalars_alike():
    assert cell(30000) == cell(np.int64(30000)) == "30,000"
    assert cell(0.0040001) == "0.004"
    assert cell(1500.0) == "1,500"
    assert cell(-2) == "−2"
    assert cell(True) == "yes"
    assert cell(None) == cell(np.nan) == "–"
    assert cell("as it is") == "as it is"


def test_columns_are_set_right_only_when_they_hold_numbers():
    numbers = [3, 0.5, None, "+3.2", "−0.4 [−1.0, +0.2]", "[+1.8, +4.7]", "1,500", "12 %", 1e-9]
    assert all(map(is_numeric, numbers))
    assert not any(map(is_numeric, ["0, 1, 2", "3 seeds", "16px", "a", "2024-01-02"]))


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=200), most=st.integers(4, 40))
def test_shortened_names_fit_on_one_line_and_short_ones_are_kept(text, most):
    line = shorten(text, most)
    assert display_width(line) <= most
    assert len(line.splitlines()) <= 1
    assert inert(line) == line
    clean = " ".join(inert(text).split())
    if len(clean) <= most and display_width(clean) <= most:
        assert line == clean


def test_long_names_stay_apart_by_their_ends():
    names = [f"laion_aesthetics_subset_of_nature_{letter}" for letter in "ab"]
    assert len({shorten(name, 22) for name in names}) == 2


def test_a_name_of_a_million_characters_is_no_trap():
    for text in ("a" * 10**6, "1" * 10**6 + "x", "e" + "\u0301" * 10**6, "9," * 10**6):
        assert len(shorten(text, 22)) <= 88
        is_numeric(text)


def test_text_that_acts_on_its_surroundings_is_made_inert():
    assert inert("a\u202eb\x00c\ud800d\ne\u200f") == "a\ufffdb\ufffdc\ufffdd\ne\u200f"
