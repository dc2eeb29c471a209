# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anabranch.data.boxes import flip_boxes, transform_boxes
from anabranch.data.decode import decode


@pytest.mark.parametrize(
    ("width", "height", "size", "box"),
    [
        (64, 64, 32, (8, 16, 24, 40)),
        (90, 60, 30, (31, 20, 61, 40)),
        (60, 90, 120, (6, 33, 30, 57)),
        (101, 40, 80, (40, 4, 60, 24)),
        (90, 60, 30, (3, 10, 45, 50)),  # cut by the left edge of the square
    ],
)
def test_a_painted_rectangle_lies_where_its_box_says(tmp_path, width, height, size, box):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    decoded = decode(tmp_path / "x.png", size, 1)[0] / 255
    ((x1, y1, x2, y2),) = transform_boxes([box], width, height, size)
    assert decoded[round((y1 + y2) / 2)].sum() == pytest.approx(x2 - x1, abs=0.15)
    assert decoded[:, round((x1 + x2) / 2)].sum() == pytest.approx(y2 - y1, abs=0.15)
    ys, xs = np.nonzero(decoded > 0.5)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == pytest.approx((x1, y1, x2, y2), abs=0.51)


def test_a_box_with_more_than_nine_tenths_cut_off_is_dropped_and_others_are_clipped():
    wide = {"width": 300, "height": 100, "size": 50}  # the square keeps x from 100 to 200
    assert transform_boxes([(0, 0, 109, 10)], **wide) == []
    assert transform_boxes([(10, 0, 110, 10)], **wide) == [(0, 0, 5, 5)]
    assert transform_boxes([(0, 0, 90, 10), (210, 0, 290, 10)], **wide) == []
    assert transform_boxes([(0, 0, 300, 100)], **wide) == [(0, 0, 50, 50)]
    assert transform_boxes([], **wide) == []


sides = st.integers(8, 400)
shares = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(4, 128), shares, shares, st.floats(0.02, 1), st.floats(0.02, 1))
def test_scaling_image_and_box_together_changes_nothing_and_mirroring_commutes(width, height, size, u, v, p, q):
    w, h = p * width, q * height
    box = (u * (width - w), v * (height - h), u * (width - w) + w, v * (height - h) + h)
    moved = transform_boxes([box], width, height, size)
    larger = transform_boxes([[3 * edge for edge in box]], 3 * width, 3 * height, size)
    mirrored = transform_boxes(flip_boxes([box], width), width, height, size)
    assert np.array(larger) == pytest.approx(np.array(moved), abs=1e-6)
    assert np.array(mirrored) == pytest.approx(np.array(flip_boxes(moved, size)), abs=1e-6)
    assert all(0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size for x1, y1, x2, y2 in moved)


def test_mirroring_twice_is_nothing():
    assert flip_boxes([(1, 2, 5, 9)], 20) == [(15, 2, 19, 9)]
    assert flip_boxes(flip_boxes([(1, 2, 5, 9)], 20), 20) == [(1, 2, 5, 9)]
