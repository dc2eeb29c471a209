# SPDX-License-Identifier: Apache-2.0
import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anabranch.report.figures import (
    ClusterSheet,
    Effect,
    Matrix,
    cluster_sheets,
    contact_sheet,
    curves,
    forest,
    loads,
    matrix,
    two_matrices,
)
from anabranch.report.lines import spread, thin
from anabranch.report.page import Page, Section, render

NAMES = ["garments", "digits"]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</text></svg><svg onload=alert(1)>",
    "<!-- $\\frac{ --> &amp;",
    "المجال\u202e\x00\udcff",
    "画像🦊",
    "very_long_name_" * 400,
    "#000100",
    "",
]


def texts(svg):
    return [element.text for element in ElementTree.fromstring(f"<div>{svg}</div>").iter("text")]


def images(count, channels=1, size=6):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def every_figure(a="garments", b="digits"):
    """One of each kind, with gaps in the data, under the given labels."""
    holes = [[1.5, None], [-2.0, 0.0]]
    low, high = [[0.5, None], [-3.0, float("-inf")]], [[2.5, None], [-1.0, float("inf")]]
    sheet = ClusterSheet(
        name=a, size=3, nearest=images(3), border=images(0), random=images(2, 3), labels=[(b, 2.0)], sibling=b
    )
    return [
        matrix(holes, low, high, [a, b], [a, b], a, row_title=b, column_title=a),
        two_matrices(Matrix(a, holes, low, high), Matrix(b, holes), [a, b], [a, b], b, unit=a, center=1.0),
        curves({a: ([0, 1, 2], [1, None, 3], [0, None, 2], [2, None, 4]), f"{b} ": ([0], [None], None, None)}, a, b, a),
        loads({0: [[0.25, None], [0.75, 0.5]]}, [a, b], b, expert_names=[a, b]),
        forest([Effect(a, 1.0, 0.5, 1.5, 3, "shown"), Effect(b, None, None, None, None, b)], a, b),
        contact_sheet(images(5, 3), a, columns=2, labels=[b] * 5),
        cluster_sheets([sheet], b),
    ]


def test_every_figure_has_words_a_table_and_a_whole_picture():
    for figure in every_figure():
        assert figure.alt.strip()
        assert figure.caption
        assert figure.table.rows
        closed = re.sub(r"(<img[^>]*)>", r"\1/>", figure.svg)
        ElementTree.fromstring(f"<div>{closed}</div>")  # raises where a tag is left open


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_add_no_elements_to_any_picture(label):
    for hostile, harmless in zip(every_figure(label, label), every_figure("label", "label"), strict=True):
        tags, expected = (re.findall(r"</?\w+", figure.svg) for figure in (hostile, harmless))
        assert tags == expected if label else set(tags) <= set(expected)
        html = render(Page("title", ["verdict"], (), [Section("s", figures=[hostile])]))
        assert not re.search(r"<script|<[^>]*\son\w+=|nan", re.sub(r'"[^"]*"', "", html.lower()))
        assert "://" not in html


def test_labels_are_printed_as_they_are_even_if_they_look_like_markup_or_colours():
    names = ["#000100", "$x_1$ & <b>", "a  b"]
    assert {"#000100", "$x_1$ & <b>", "a b"} <= set(texts(matrix(np.eye(3), None, None, names, names, "t").svg))


def test_the_same_numbers_give_the_same_bytes():
    assert [figure.svg for figure in every_figure()] == [figure.svg for figure in every_figure()]


def test_pictures_carry_no_ids_fonts_dates_or_colours_of_their_own():
    for figure in every_figure():
        for part in re.findall(r"<(?:path|text|svg)[^>]*>", figure.svg):
            assert not re.search(r"\bid=|font-family|xlink|xmlns|clip-path|#[0-9a-f]{6}", part)


def test_a_users_matplotlib_settings_do_not_change_the_report():
    import matplotlib as mpl

    before = every_figure()[2].svg
    with mpl.rc_context({"text.usetex": True, "svg.fonttype": "path", "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert every_figure()[2].svg == before


def test_a_matrix_prints_values_intervals_stars_and_outlines():
    figure = matrix([[3.2, -0.4], [None, -2.0]], [[1.8, -1], [None, -3]], [[4.7, 1], [None, -1]], NAMES, NAMES, "gain")
    shown = texts(figure.svg)
    assert [text for text in shown if text[0] in "+−–"] == ["+3.2*", "−0.4", "–", "−2.0*"]
    assert "[+1.8, +4.7]" in shown
    bold = re.findall(r"font-weight:700[^>]*>([^<]+)<", figure.svg)
    assert bold == ["+3.2*", "−2.0*"]
    assert figure.svg.count("stroke:var(--ink)") == 2  # garments on garments, digits on digits
    assert figure.table.rows == [
        ["garments", "+3.2 [+1.8, +4.7]", "−0.4 [−1.0, +1.0]"],
        ["digits", "–", "−2.0 [−3.0, −1.0]"],
    ]
    assert "Highest: +3.2 at garments, garments. Lowest: −2.0 at digits, digits." in figure.alt


def fills(svg):
    """(colour, opacity) of each coloured cell in drawing order."""
    return [(name, float(alpha)) for name, alpha in re.findall(r"fill:var\(--(gain|harm)\);opacity:([\d.]+)", svg)]


def test_colour_follows_sign_and_size_and_two_maps_share_one_scale():
    (gain, strong), (harm, weak) = fills(matrix([[4.0, -1.0]], None, None, ["a"], ["b", "c"], "t").svg)
    assert (gain, harm) == ("gain", "harm")
    assert weak == pytest.approx(strong / 4, abs=1e-3)
    pair = two_matrices(Matrix("left", [[4.0]]), Matrix("right", [[-8.0]]), ["a"], ["b"], "t")
    (_, left), (_, right) = fills(pair.svg)
    assert left == pytest.approx(right / 2, abs=1e-3)
    assert [row[0] for row in pair.table.rows] == ["left", "right"]


def test_a_centre_that_is_not_zero_prints_levels_without_signs():
    figure = matrix([[60.0, 40.0]], [[55.0, 39.0]], [[65.0, 51.0]], ["a"], ["b", "c"], "t", unit="%", center=50)
    assert "60.0*" in texts(figure.svg)
    assert "40.0" in texts(figure.svg)
    assert figure.table.rows == [["a", "60.0 [55.0, 65.0]", "40.0 [39.0, 51.0]"]]


def test_numbers_of_the_wrong_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"low: expected shape \(1, 2\), received \(2, 1\)"):
        matrix([[1, 2]], [[1], [2]], None, ["a"], ["b", "c"], "t")
    with pytest.raises(ValueError, match="shared: expected x, y, low, high of one length"):
        curves({"shared": ([1, 2], [1], None, None)}, "steps", "loss")
    with pytest.raises(ValueError, match="layer 3: expected shares of at least 0"):
        loads({3: [[-0.5]]}, ["a"], "t")
    with pytest.raises(ValueError, match="images: expected uint8"):
        contact_sheet(np.zeros((2, 1, 4, 4)), "t")
    with pytest.raises(ValueError, match="labels: expected 2"):
        contact_sheet(images(2), "t", labels=["one"])


def test_nothing_measured_still_makes_a_page():
    empty = [
        matrix(np.full((2, 2), np.nan), None, None, NAMES, NAMES, "t"),
        matrix(np.zeros((0, 2)), None, None, [], NAMES, "t"),
        curves({}, "steps", "loss"),
        curves({"shared": ([], [], None, None)}, "steps", "loss"),
        loads({}, NAMES, "t"),
        forest([], "t"),
        contact_sheet(images(0), "t"),
        cluster_sheets([]),
    ]
    html = render(Page("title", ["verdict"], (), [Section("s", figures=empty)]))
    assert html.count("<figure>") == len(empty)
    assert "nan" not in html.lower()


def test_curves_list_their_numbers_and_thin_long_ones_openly():
    figure = curves({"shared": ([0, 10], [1, 2], [0, 1], [2, 3]), "own": ([10], [5], None, None)}, "steps", "accuracy")
    assert figure.table.rows == [[0, "1 [0, 2]", "–"], [10, "2 [1, 3]", "5"]]
    steps = np.arange(10_000)
    long = curves({"shared": (steps, np.sqrt(steps), None, None)}, "steps", "accuracy")
    assert long.table.rows[0][0] == 0
    assert long.table.rows[-1][0] == 9999
    assert long.table.notes == ["40 of 10,000 points, evenly spaced."]
    assert len(long.svg) < 30_000


def test_a_gap_in_a_curve_is_a_gap_in_the_line():
    whole = curves({"a": ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], None, None)}, "x", "y").svg
    broken = curves({"a": ([0, 1, 2, 3, 4], [1, 2, None, 4, 5], None, None)}, "x", "y").svg
    lines = [re.findall(r"<path d=\"([^\"]*)\" style=\"[^\"]*stroke:var\(--series-1\)", svg) for svg in (whole, broken)]
    assert [path.count("M") for paths in lines for path in paths] == [1, 1, 1]


@settings(deadline=None, max_examples=200)
@given(wanted=st.lists(st.floats(0, 300), max_size=12))
def test_spread_labels_never_overlap_keep_their_order_and_stay_inside(wanted):
    placed = spread(wanted, 16, 0, 300)
    assert all(-1e-6 <= y <= 300 + 1e-6 for y in placed)
    order = np.argsort(wanted, kind="stable")
    gaps = np.diff(np.array(placed)[order])
    assert (gaps >= 16 - 1e-6).all()
    if len(wanted) > 1 and np.diff(np.sort(wanted)).min() >= 16:
        assert placed == pytest.approx(wanted, abs=1e-6)


def test_thinning_keeps_both_ends_and_everything_when_it_is_little():
    assert thin(5, 40).tolist() == [0, 1, 2, 3, 4]
    assert thin(1000, 40)[[0, -1]].tolist() == [0, 999]
    assert len(thin(1000, 40)) == 40
    assert thin(0, 40).size == 0


def test_loads_print_percent_of_each_domain_in_every_layer():
    load = np.array([[[0.25, 1.0], [0.75, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    figure = loads(load, NAMES, "who takes what")
    assert [text for text in texts(figure.svg) if text.isdigit()] == ["25", "100", "75", "0"] + ["50"] * 4
    assert figure.table.rows[1] == ["layer 0", "expert 1", "75", "0"]
    assert "even split would put 50" in figure.notes[0]


def test_a_forest_puts_means_in_order_of_size_around_the_zero_line_and_says_the_verdict():
    figure = forest([("loss", -2.0, -3.0, -1.0, 4, "hurts"), ("win", 1.7, 1.0, 2.4, 15, "shown")], "t")
    centres = re.findall(r'<path d="M ([\d.]+) [^"]*" style="fill:var\(--series-[12]\)', figure.svg)
    zero = next(float(x) for x in re.findall(r'd="M ([\d.]+) [^"]*" style="[^"]*stroke:var\(--muted\)', figure.svg))
    assert float(centres[0]) < zero < float(centres[1])
    assert texts(figure.svg)[-4:] == ["win", "+1.7 [+1.0, +2.4]", "15", "shown"]
    assert "loss: −2.0 [−3.0, −1.0], hurts" in figure.alt


def opened(figure):
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in re.findall(r"base64,([^\"]+)", figure.svg)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_holds_every_pixel_in_reading_order(channels):
    pixels = images(5, channels, size=4)
    (sheet,) = opened(contact_sheet(torch.from_numpy(pixels), "t", columns=3))
    drawn = np.asarray(sheet)
    assert drawn.shape == (2 * 4 + 2, 3 * 4 + 2 * 2, channels + 1)
    for index, image in enumerate(pixels):
        top, left = index // 3 * 6, index % 3 * 6
        np.testing.assert_array_equal(drawn[top : top + 4, left : left + 4, :channels], image.transpose(1, 2, 0))
    assert (drawn[..., -1] == 0).sum() == drawn[..., 0].size - 5 * 16  # gaps are clear


def test_large_images_become_thumbnails():
    (sheet,) = opened(contact_sheet(images(2, 3, size=200), "t", columns=2))
    assert sheet.size == (2 * 96 + 2, 96)


def test_cards_say_size_lift_purity_and_sibling():
    sheet = ClusterSheet(
        name="group 1",
        size=1304,
        nearest=images(8),
        border=images(2),
        random=images(8),
        labels=[("garments", 4.21)],
        purity=0.834,
        sibling="group 2",
    )
    figure = cluster_sheets([sheet])
    for words in ("group 1", "1,304 images", "garments ×4.2", "purity 0.83", "nearest sibling group 2"):
        assert words in figure.svg
    assert len(opened(figure)) == 3
    assert figure.table.rows == [["group 1", 1304, "garments ×4.2", 0.834, "group 2"]]
