import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.suppress.geom_erasing.bins import Grid, covered_bins, region_weights, upsampled

GRID = Grid(8, 8)


def slow_bins(boxes, width, height, grid):
    """Every bin that shares area with a box, by comparing all of them."""
    found = []
    for n in range(grid.rows):
        for m in range(grid.columns):
            left, right = m * width / grid.columns, (m + 1) * width / grid.columns
            top, bottom = n * height / grid.rows, (n + 1) * height / grid.rows
            if any(x1 < right and x2 > left and y1 < bottom and y2 > top for x1, y1, x2, y2 in boxes):
                found.append((m, n))
    return found


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(0, 0, 64, 64)], [(0, 0)]),
        ([(0, 0, 65, 64)], [(0, 0), (1, 0)]),
        ([(448, 448, 512, 512)], [(7, 7)]),
        ([(100, 100, 101, 101)], [(1, 1)]),
        ([(0, 0, 65, 64), (10, 10, 20, 20)], [(0, 0), (1, 0)]),
        ([(-50, 500, 10, 900)], [(0, 7)]),
    ],
)
def test_bins_of_known_boxes(boxes, expected):
    assert covered_bins(boxes, 512, 512, GRID) == expected


def test_a_full_image_covers_every_bin_row_by_row():
    assert covered_bins([(0, 0, 512, 512)], 512, 512, GRID) == GRID.bins()
    assert GRID.bins()[:2] == [(0, 0), (1, 0)]


def test_the_printed_formula_adds_an_empty_bin_on_a_boundary_but_stays_inside_the_grid():
    assert covered_bins([(0, 0, 64, 64)], 512, 512, GRID, closed=True) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert covered_bins([(448, 448, 512, 512)], 512, 512, GRID, closed=True) == [(7, 7)]


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (math.nan, 0, 5, 5), (600, 0, 700, 9), (-9, 0, 0, 9)])
def test_a_box_without_a_part_inside_is_refused(box):
    with pytest.raises(ValueError, match="box: expected"):
        covered_bins([box], 512, 512, GRID)


@st.composite
def scenes(draw):
    width, height = draw(st.integers(8, 700)), draw(st.integers(8, 700))
    grid = Grid(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append((x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))))
    return width, height, grid, boxes


@settings(max_examples=300, deadline=None)
@given(scenes())
def test_bins_are_those_that_share_area_at_any_scale_and_mirrored(scene):
    width, height, grid, boxes = scene
    bins = covered_bins(boxes, width, height, grid)
    assert bins == slow_bins(boxes, width, height, grid)
    assert bins == covered_bins([[2 * v for v in box] for box in boxes], 2 * width, 2 * height, grid)
    flipped = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
    mirrored = {(grid.columns - 1 - m, n) for m, n in bins}
    assert set(covered_bins(flipped, width, height, grid)) == mirrored


def test_weights_of_four_bins_in_sixty_four():
    weights = region_weights([(0, 0), (1, 0), (0, 1), (1, 1)], GRID, alpha=2)
    assert weights[0, 0].item() == pytest.approx(0.5161, abs=1e-4)
    assert weights[5, 5].item() == pytest.approx(1.0323, abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    grid=st.builds(Grid, st.integers(1, 9), st.integers(1, 9)),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 10**6),
    scale=st.integers(1, 4),
)
def test_weights_sum_to_the_number_of_bins_and_keep_their_ratio(grid, alpha, seed, scale):
    chosen = torch.rand(len(grid), generator=torch.Generator().manual_seed(seed)) < 0.4
    covered = [place for place, take in zip(grid.bins(), chosen, strict=True) if take]
    weights = region_weights(covered, grid, alpha)
    assert weights.sum().item() == pytest.approx(len(grid), rel=1e-5)
    if 0 < len(covered) < len(grid):
        inside = weights[covered[0][1], covered[0][0]]
        outside = weights.flatten()[[not take for take in chosen.tolist()]][0]
        assert (outside / inside).item() == pytest.approx(alpha, rel=1e-4)
    else:
        assert torch.equal(weights, torch.ones_like(weights))
    fine = upsampled(weights, (grid.rows * scale, grid.columns * scale))
    assert fine.mean().item() == pytest.approx(weights.mean().item(), rel=1e-5)
    odd = upsampled(weights[None], (13, 11))
    assert odd.mean().item() == pytest.approx(weights.mean().item(), rel=1e-3)


def test_the_ends_of_alpha():
    covered = [(0, 0), (1, 1)]
    assert torch.equal(region_weights(covered, GRID, 1), torch.ones(8, 8))
    masked = region_weights(covered, GRID, math.inf)
    assert masked[0, 0] == 0
    assert masked.sum().item() == pytest.approx(64)
    with pytest.raises(ValueError, match="alpha: expected above 0, received 0"):
        region_weights(covered, GRID, 0)
