# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.suppress.detectors.occlusion import edges, occlusion_boxes


def share_of_white(images):
    """p = share of a mark's 8 x 8 white pixels that can be seen."""
    return np.array([(image == 255).all(-1).sum() / 64 for image in images])


@settings(max_examples=200, deadline=None)
@given(column=st.integers(0, 7), row=st.integers(0, 7), width=st.integers(64, 90), height=st.integers(64, 90))
def test_a_mark_inside_one_cell_gives_that_cell(column, row, width, height):
    xs, ys = edges(width, 8), edges(height, 8)
    image = np.zeros((height, width, 3), np.uint8)
    image[ys[row] : ys[row] + 8, xs[column] : xs[column] + 8] = 255
    assert occlusion_boxes(share_of_white, image) == [(xs[column], ys[row], xs[column + 1], ys[row + 1])]


def test_a_mark_across_two_cells_gives_both_and_two_marks_two_boxes():
    image = np.zeros((64, 64, 3), np.uint8)
    image[8:16, 12:20] = 255
    assert occlusion_boxes(share_of_white, image) == [(8, 8, 24, 16)]
    image[:] = 0
    image[:8, :4] = image[56:, 60:] = 255
    assert occlusion_boxes(share_of_white, image) == [(0, 0, 8, 8), (56, 56, 64, 64)]


def test_no_cell_alone_matters():
    spread = np.zeros((64, 64, 3), np.uint8)
    spread[::8, ::8] = 255
    assert occlusion_boxes(share_of_white, spread) == []
    assert occlusion_boxes(share_of_white, np.zeros((64, 64, 3), np.uint8)) == []


def test_images_smaller_than_the_grid_and_a_grid_of_nothing():
    image = np.zeros((3, 5, 3), np.uint8)
    image[1, 2] = 255
    assert occlusion_boxes(share_of_white, image) == [(2, 1, 3, 2)]
    with pytest.raises(ValueError, match="grid: expected at least 1, received 0"):
        occlusion_boxes(share_of_white, image, grid=0)
