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

from anabranch.report.boxes import HALO, LINE, frame, shown_size
from anabranch.report.figures import boxed_sheet, heat_strip, strips
from anabranch.report.page import Page, Section, render
from anabranch.report.sheets import GAP
from anabranch.report.text import inert

HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "画像\u202e\x00", "long " * 400, ""]


def images(count, channels=1, height=8, width=8):
    generator = np.random.default_rng(0)
    return generator.integers(30, 226, (count, channels, height, width), dtype=np.uint8)


def opened(figure):
    return [
        np.array(Image.open(io.BytesIO(base64.b64decode(png)))) for png in re.findall(r"base64,([^\"]+)", figure.svg)
    ]


def tile(sheet, index, size):
    left = index * (size + GAP)
    return sheet[:size, left : left + size, :3]


def where(picture, color):
    return np.argwhere((picture == color).all(-1))


def slow_frame(picture, box, scale):
    """Colour each pixel by its distance from the box, in steps to the side or up and down, whichever is more."""
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (round(edge * scale) for edge in box)
    drawn = picture.copy()
    for y in range(height):
        for x in range(width):
            aside = max(x1 - x, x - (x2 - 1), 0)
            above = max(y1 - y, y - (y2 - 1), 0)
            if max(aside, above) in (1, 2):
                drawn[y, x] = (LINE, HALO)[max(aside, above) - 1]
    return drawn


@settings(deadline=None, max_examples=200)
@given(
    x=st.integers(2, 12),
    y=st.integers(2, 12),
    width=st.integers(1, 6),
    height=st.integers(1, 6),
    zoom=st.integers(1, 4),
)
def test_a_frame_lies_around_its_box_and_leaves_its_inside_alone(x, y, width, height, zoom):
    box = (x, y, x + width, y + height)
    picture = np.random.default_rng(0).integers(30, 226, (20 * zoom, 20 * zoom, 3), dtype=np.uint8)
    drawn = picture.copy()
    frame(drawn, box, (zoom, zoom))
    np.testing.assert_array_equal(drawn, slow_frame(picture, box, zoom))


def test_at_the_border_the_bright_line_stays_visible():
    (sheet,) = opened(boxed_sheet(images(1), [[(0, 0, 8, 8)]], "t"))
    assert sheet.shape[:2] == (96, 96)
    assert len(where(sheet[..., :3], LINE)) == 4 * 95


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_without_boxes_holds_every_pixel_enlarged(channels):
    pixels = images(3, channels)
    (sheet,) = opened(boxed_sheet(torch.from_numpy(pixels), [[], [], []], "t"))
    for index, image in enumerate(pixels):
        expected = np.broadcast_to(np.kron(image, np.ones((1, 12, 12), np.uint8)), (3, 96, 96)).transpose(1, 2, 0)
        np.testing.assert_array_equal(tile(sheet, index, 96), expected)


def test_boxes_land_on_their_own_image_at_any_size():
    for side in (8, 400):
        boxes = [[], [(side / 4, side / 4, side / 2, side / 2)]]
        (sheet,) = opened(boxed_sheet(images(2, 3, side, side), boxes, "t"))
        assert not len(where(tile(sheet, 0, 96), LINE))
        found = where(tile(sheet, 1, 96), LINE)
        assert (found.min(0).tolist(), found.max(0).tolist()) == ([23, 23], [48, 48])


def test_the_table_lists_labels_and_corners():
    figure = boxed_sheet(images(2), [[(1, 2, 3, 4.5), (0, 0, 1, 1)], []], "t", labels=["coat", "bag"])
    assert figure.table.columns == ["image", "label", "boxes"]
    assert figure.table.rows == [[1, "coat", "1,2–3,4.5; 0,0–1,1"], [2, "bag", "–"]]
    assert "2 images, 1 of them with a box" in figure.alt


def test_rows_of_strips_are_aligned_and_counted():
    figure = strips(
        [("before", images(5), [[(0, 0, 2, 2)], [], [(1, 1, 3, 3)] * 2, [], []]), ("after", images(5), None)], "t"
    )
    first, second = opened(figure)
    assert first.shape == second.shape
    assert figure.table.rows == [["before", 5, 2, 3], ["after", 5, None, None]]
    assert "before, 2 of 5 with a box; after, – of 5 with a box" in figure.alt


def test_many_columns_shrink_to_the_page_but_never_below_a_pixel():
    assert shown_size(28, 28, 12, 880) == (56, 56)
    assert shown_size(28, 28, 60, 880) == (28, 28)
    assert shown_size(400, 200, 4, 880) == (96, 48)


def test_heat_runs_from_nothing_to_the_largest_of_its_row():
    maps = np.zeros((2, 2, 2))
    maps[1, 0, 1] = 0.25
    figure = heat_strip(images(2), [("the word", maps), ("all zero", np.zeros((2, 4, 4)))], "t")
    shown, word, zero = opened(figure)
    assert shown.shape == word.shape == zero.shape
    dark, bright = tile(word, 0, 96)[0, 0], tile(word, 1, 96)[10, 60]
    assert dark.astype(int).sum() + 200 < bright.astype(int).sum()
    assert (tile(zero, 1, 96) == dark).all()
    assert figure.table.rows == [["the word", 2, "2×2", "0.250"], ["all zero", 2, "4×4", "0.000"]]


def test_boxes_frame_images_and_maps_alike():
    shown, heat = opened(heat_strip(images(1), [("word", np.ones((1, 2, 2)))], "t", [[(2, 2, 6, 6)]]))
    np.testing.assert_array_equal(where(shown[..., :3], LINE), where(heat[..., :3], LINE))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_inert(name):
    figures = [
        boxed_sheet(images(1), [[(0, 0, 2, 2)]], name, labels=[name]),
        strips([(name, images(2), [[], []])], name),
        heat_strip(images(2), [(name, np.ones((2, 3, 3)))], name),
    ]
    for figure in figures:
        closed = inert(re.sub(r"(<img[^>]*)>", r"\1/>", str(figure.svg)))
        tags = {element.tag for element in ElementTree.fromstring(f"<div>{closed}</div>").iter()}
        assert {"div", "img"} <= tags <= {"div", "img", "p", "i"}
    html = render(Page("title", ["verdict"], (), [Section("s", figures=figures)]))
    assert not re.search(r"<script|<[^>]*\son\w+=", re.sub(r'"[^"]*"', "", html.lower()))
    assert "://" not in html


def test_nothing_to_show_still_makes_a_page():
    none = images(0)
    figures = [boxed_sheet(none, [], "t"), strips([], "t"), strips([("a", none, [])], "t"), heat_strip(none, [], "t")]
    assert render(Page("title", ["verdict"], (), [Section("s", figures=figures)])).count("<figure>") == 4


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="images: expected uint8"):
        boxed_sheet(np.zeros((1, 1, 4, 4)), [[]], "t")
    with pytest.raises(ValueError, match="boxes: expected 2 lists, one an image, received 1"):
        boxed_sheet(images(2), [[]], "t")
    with pytest.raises(ValueError, match=r"boxes: expected 0 <= x1 < x2 <= 8.*received \(4, 4, 3, 3\)"):
        boxed_sheet(images(1), [[(4, 4, 3, 3)]], "t")
    with pytest.raises(ValueError, match="labels: expected 1, one an image, received 2"):
        boxed_sheet(images(1), [[]], "t", labels=["a", "b"])
    with pytest.raises(ValueError, match=r"rows: expected as many images of one size in each"):
        strips([("a", images(2), None), ("b", images(3), None)], "t")
    with pytest.raises(ValueError, match=r"word: expected maps \(2, h, w\) of at least 0, received \(1, 3, 3\)"):
        heat_strip(images(2), [("word", np.ones((1, 3, 3)))], "t")
