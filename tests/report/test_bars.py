# SPDX-License-Identifier: Apache-2.0
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.report.bars import PLOT, from_zero
from anabranch.report.figures import RateRow, rate_bars
from anabranch.report.page import Page, Section, render

ROWS = [
    RateRow("before", 40.0, 35.0, 45.0, "n = 500"),
    RateRow("erased", 10.0, 7.5, 12.5),
    RateRow("not run", None, None, float("nan")),
]


def texts(svg):
    return [element.text for element in ElementTree.fromstring(f"<div>{svg}</div>").iter("text")]


def bars(svg):
    """(start, end) of each bar in drawing order."""
    paths = re.findall(r'd="([^"]+)" style="fill:var\(--series-1\);opacity:0.55', svg)
    xs = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)] for path in paths]
    return [(min(x), max(x)) for x in xs]


def test_bars_start_at_zero_and_are_as_long_as_their_rates():
    (start, first), (other, second) = bars(rate_bars(ROWS, "t").svg)
    assert start == other
    assert first - start == pytest.approx(4 * (second - start), abs=0.05)


def test_numbers_names_and_notes_are_beside_the_bars_and_in_the_table():
    figure = rate_bars(ROWS, "images with the mark", reference=20.0, reference_name="half of before")
    shown = texts(figure.svg)
    assert {"before", "40.0 [35.0, 45.0]", "n = 500", "10.0 [7.5, 12.5]", "–", "half of before 20.0"} <= set(shown)
    assert [text for text in shown if text.endswith("%")] == ["50 %"]
    assert figure.table.rows[1] == ["erased", "10.0", "[7.5, 12.5]", ""]
    assert figure.table.columns == ["name", "rate (%)", "interval", "note"]
    assert figure.alt == (
        "images with the mark, bars of 3 rates in %. before 40.0 [35.0, 45.0], n = 500; erased 10.0 [7.5, 12.5]; "
        "not run –. A line marks half of before at 20.0."
    )


def test_intervals_and_the_reference_are_lines_in_ink():
    plain, marked = (rate_bars(ROWS, "t", reference=reference).svg for reference in (None, 20.0))
    assert plain.count("stroke:var(--ink)") == 6  # a line and two ends for each known interval
    assert marked.count("stroke:var(--ink)") == 7
    assert "stroke-dasharray" in marked
    assert "stroke-dasharray" not in plain


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.just(np.nan), st.floats(0, 100)), max_size=6))
def test_the_scale_starts_at_zero_and_holds_every_rate(rates):
    to_x = from_zero(np.array(rates), 50.0)
    assert (to_x.low, to_x(0.0), to_x.ticks[0]) == (0, 50, 0)
    places = [to_x(rate) for rate in sorted(filter(np.isfinite, rates))]
    assert places == sorted(places)
    assert all(50 <= place <= 50 + PLOT + 1e-9 for place in places)


def test_an_interval_over_seeds_that_reaches_below_zero_is_cut_there_but_printed_whole():
    figure = rate_bars([RateRow("a", 1.0, -0.5, 2.5)], "t")
    assert "1.0 [−0.5, 2.5]" in texts(figure.svg)
    assert figure.svg.count("stroke:var(--ink)") == 2


@pytest.mark.parametrize(
    "name", ["<script>", "</svg><img src=x onerror=alert(1)>", "名前\u202e\x00", "long_" * 99, "#000100", ""]
)
def test_hostile_names_make_a_whole_inert_picture(name):
    rows = [RateRow(name, 3.0, 1.0, 5.0, name), RateRow(name, 0.0, 0.0, None, name)]
    figure = rate_bars(rows, name or "t", name, 2.0, reference_name=name)
    assert {element.tag for element in ElementTree.fromstring(figure.svg).iter()} <= {"svg", "path", "text"}
    assert figure.svg == rate_bars(rows, name or "t", name, 2.0, reference_name=name).svg
    assert not re.search(r"#[0-9a-f]{6}|\bnan\b", re.sub(r"<text.*?</text>", "", str(figure.svg)))


def test_nothing_measured_still_makes_a_page():
    html = render(Page("title", ["verdict"], (), [Section("s", figures=[rate_bars([], "rates")])]))
    assert "rates, bars of 0 rates in %. No rates." in html


def test_numbers_of_arrays_do_as_well_as_python_ones():
    row = [np.float64(40), np.float32(35), np.int64(45)]
    assert rate_bars([("before", *row)], "t").svg == rate_bars([("before", 40.0, 35.0, 45.0)], "t").svg


def test_a_rate_below_zero_is_refused():
    with pytest.raises(ValueError, match="rows: expected rates of at least 0, received"):
        rate_bars([RateRow("a", -1.0, -2.0, 0.0)], "t")
