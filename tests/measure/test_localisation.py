# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.measure.localisation import boxes_as_masks, localisation, resize


def slow_auroc(one, mask):
    """Share of (inside, outside) pairs of pixels in the right order; a tie is half a pair."""
    inside, outside = one[mask], one[~mask]
    right = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return right / (len(inside) * len(outside))


def slow_resize(one, height, width):
    """Each pixel's centre in the small map, its four neighbours weighted by their distance."""
    h, w = one.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            upper = one[top, left] * (1 - (x - left)) + one[top, right] * (x - left)
            lower = one[below, left] * (1 - (x - left)) + one[below, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.fixture
def masks():
    return boxes_as_masks([[(0, 0, 4, 2)], [(8, 8, 12, 10)], [(2, 3, 6, 5)]], 16, 16)


def test_the_mask_itself_is_found_and_a_constant_map_is_not(masks):
    found = localisation(masks, masks)
    assert (found.auroc.mean, found.lift.mean, found.pointing.rate) == pytest.approx((1, 256 / 8, 1))
    nothing = localisation(np.full((3, 4, 4), 0.2), masks)
    assert (nothing.auroc.mean, nothing.lift.mean, nothing.pointing.rate) == pytest.approx((0.5, 1, 0))


def test_a_map_that_looks_elsewhere_is_below_chance(masks):
    found = localisation(~masks, masks)
    assert found.auroc.high == 0
    assert found.lift.high == 0


def test_a_corner_cell_whose_maximum_is_a_plateau_counts_by_half():
    one = np.zeros((1, 4, 4))
    one[0, 0, 0] = 1  # enlarged to 16 x 16 its maximum fills 2 x 2 pixels
    assert localisation(one, boxes_as_masks([[(0, 0, 2, 1)]], 16, 16)).pointing.rate == 1
    assert localisation(one, boxes_as_masks([[(0, 0, 1, 1)]], 16, 16)).pointing.rate == 0


@settings(deadline=None, max_examples=200)
@given(h=st.integers(1, 4), w=st.integers(1, 4), scale=st.integers(1, 3), seed=st.integers(0, 2**31 - 1))
def test_it_is_the_slow_loop_and_knows_no_unit(h, w, scale, seed):
    generator = np.random.default_rng(seed)
    one = generator.random((h, w)) + 1e-3
    mask = generator.random((h * scale + 1, w * scale + 1)) < 0.4
    mask[0, 0], mask[-1, -1] = True, False
    large = resize(one[None], *mask.shape)[0]
    np.testing.assert_allclose(large, slow_resize(one, *mask.shape), atol=1e-12)
    found = localisation(one[None], mask[None])
    assert found.auroc.mean == pytest.approx(slow_auroc(large, mask), abs=1e-9)
    assert found.lift.mean == pytest.approx(large[mask].sum() / large.sum() * mask.size / mask.sum())
    louder = localisation(8 * one[None], mask[None])
    assert (louder.auroc.mean, louder.lift.mean, louder.pointing) == pytest.approx(
        (found.auroc.mean, found.lift.mean, found.pointing)
    )


def test_boxes_cover_the_pixels_whose_centres_they_hold():
    (mask,) = boxes_as_masks([[(0.4, 0, 2.5, 1), (5, 3, 6, 4)]], 4, 6)
    assert np.argwhere(mask).tolist() == [[0, 0], [0, 1], [3, 5]]


def test_what_cannot_be_measured_is_an_error(masks):
    maps = np.ones((3, 4, 4))
    with pytest.raises(ValueError, match=r"none or all of it for images \[1\]"):
        localisation(maps, masks & (np.arange(3) != 1)[:, None, None])
    with pytest.raises(ValueError, match=r"none or all of it for images \[0, 1, 2\]"):
        localisation(maps, np.ones((3, 16, 16)))
    with pytest.raises(ValueError, match=r"maps: expected finite values of at least 0 and one above.* \[0, 2\]"):
        localisation(maps * np.array([-1, 1, 0])[:, None, None], masks)
    with pytest.raises(ValueError, match=r"masks: expected \(2, height, width\), received \(3, 16, 16\)"):
        localisation(maps[:2], masks)
    with pytest.raises(ValueError, match=r"maps: expected \(images, height, width\)"):
        resize(maps[0], 8, 8)
    with pytest.raises(ValueError, match=r"boxes: expected 0 <= x1 < x2 <= 6.*received \(4, 0, 2, 1\)"):
        boxes_as_masks([[(4, 0, 2, 1)]], 4, 6)
