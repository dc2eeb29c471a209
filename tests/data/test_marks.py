# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import marks
from anabranch.data.marks import GLYPHS, Glyph, Layer
from anabranch.errors import UsageError


def changed(glyph, shape, x, y, opacity):
    """Pixels that differ on black or on white, by stamping and comparing: what the mark can change."""
    pairs = [(np.full(shape, value, np.uint8), value) for value in (0, 255)]
    differs = [marks.stamp(image, glyph, x, y, opacity)[0] != image for image, _ in pairs]
    flags = differs[0] | differs[1]
    return flags if flags.ndim == 2 else flags.any(-1)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(GLYPHS),
    size=st.integers(5, 14),
    height=st.integers(16, 30),
    width=st.integers(16, 30),
    channels=st.sampled_from([None, 1, 3]),
    opacity=st.floats(0.05, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_box_is_tight_and_the_rest_untouched(name, size, height, width, channels, opacity, seed):
    generator = np.random.default_rng(seed)
    shape = (height, width) if channels is None else (height, width, channels)
    image = generator.integers(0, 256, shape, dtype=np.uint8)
    x, y = (int(generator.integers(-size // 2, side - size // 2)) for side in (width, height))  # also over the edges
    before = image.copy()
    stamped, box = marks.stamp(image, marks.glyph(name, size), x, y, opacity)
    np.testing.assert_array_equal(image, before)
    outside = np.ones((height, width), bool)
    outside[box.y1 : box.y2, box.x1 : box.x2] = False
    np.testing.assert_array_equal(stamped[outside], image[outside])
    rows, columns = np.nonzero(changed(marks.glyph(name, size), shape, x, y, opacity))
    assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_blending_by_hand():
    half = Glyph(np.array([[0.5, 0.0], [1.0, 0.001]], np.float32), np.array([[1.0, 1.0], [0.0, 1.0]], np.float32))
    image = np.full((4, 5), 100, np.uint8)
    stamped, box = marks.stamp(image, half, 2, 1, 0.8)
    # 100 + 0.8 * 0.5 * 155 = 162;  100 + 0.8 * (0 - 100) = 20;  0.8 * 0.001 * 255 rounds to nothing
    assert (stamped[1, 2], stamped[2, 2], stamped[1, 3], stamped[2, 3]) == (162, 20, 100, 100)
    assert box == (2, 1, 3, 3)


def test_a_coloured_mark_on_grey_is_its_luma():
    red = marks.over([Layer(np.ones((2, 2)), (1.0, 0.0, 0.0))])
    grey, _ = marks.stamp(np.zeros((4, 4), np.uint8), red, 0, 0, 1.0)
    colour, _ = marks.stamp(np.zeros((4, 4, 3), np.uint8), red, 0, 0, 1.0)
    assert grey[0, 0] == round(0.299 * 255)
    assert colour[0, 0].tolist() == [255, 0, 0]


def test_layers_lie_over_each_other():
    full, none = np.ones((1, 1)), np.zeros((1, 1))
    glyph = marks.over([Layer(full, (0.0,) * 3, 0.5), Layer(full, (1.0,) * 3, 0.5)])
    assert glyph.alpha.item() == pytest.approx(0.75)
    assert glyph.value[0, 0].tolist() == pytest.approx([0.5 / 0.75] * 3)
    assert marks.over([Layer(none, (1.0,) * 3)]).alpha.item() == 0


def test_x_and_o_differ_and_plates_are_opaque():
    x, o = marks.glyph("plate-x", 8), marks.glyph("plate-o", 8)
    assert (x.alpha == 1).all()
    assert (o.alpha == 1).all()
    middle = np.s_[3:5, 3:5]
    assert x.value[middle].max() < 0.1 < 0.9 < o.value[middle].min()
    for glyph in (x, o):
        np.testing.assert_array_equal(glyph.value, glyph.value.T)
        assert (glyph.value[0] == 1).all()  # a white border, so that the letter is seen on dark images too
        assert 0.2 < (1 - glyph.value).mean() < 0.6


def test_places_are_inside_and_follow_their_law():
    generator = np.random.default_rng(0)
    spots = [marks.place(28, 40, 8, generator, "grid", 4) for _ in range(400)]
    assert {p.x for p in spots} == set(range(0, 33, 4))
    assert {p.y for p in spots} == set(range(0, 21, 4))
    corners = [marks.place(100, 200, 10, generator) for _ in range(2000)]
    assert all(0 <= p.x <= 190 and 0 <= p.y <= 90 for p in corners)
    near = [min(p.x, 190 - p.x) <= 5 and min(p.y, 90 - p.y) <= 5 for p in corners]
    assert np.mean(near) == pytest.approx(0.7, abs=0.05)
    sides = {(p.x < 100, p.y < 50) for p, is_near in zip(corners, near, strict=True) if is_near}
    assert len(sides) == 4
    assert marks.place(8, 8, 8, generator, "any") == (0, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: marks.glyph("rign", 7), "did you mean ring"),
        (lambda g: marks.glyph("ring", 4), "at least 5"),
        (lambda g: marks.place(28, 7, 8, g), "at least 8 pixels"),
        (lambda g: marks.place(28, 28, 8, g, "corner"), "did you mean corners"),
    ],
)
def test_wrong_uses(call, says):
    with pytest.raises(UsageError, match=says):
        call(np.random.default_rng(0))


def test_a_mark_beyond_the_edge_or_on_floats_is_our_mistake():
    with pytest.raises(ValueError, match="shows in the image"):
        marks.stamp(np.zeros((9, 9), np.uint8), marks.glyph("ring", 7), 9, 0, 1.0)
    with pytest.raises(ValueError, match="uint8"):
        marks.stamp(np.zeros((9, 9)), marks.glyph("ring", 7), 0, 0, 1.0)
