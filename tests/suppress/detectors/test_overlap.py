# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.suppress.detectors.overlap import best_overlaps, component_boxes, iou, non_maximum_suppression
from anabranch.suppress.detectors.protocol import Detection

corner, side = st.integers(0, 9), st.integers(1, 6)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


def cells(box):
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@settings(max_examples=200, deadline=None)
@given(boxes, boxes)
def test_iou_counts_cells(a, b):
    assert iou(a, b) == pytest.approx(len(cells(a) & cells(b)) / len(cells(a) | cells(b)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(boxes, st.integers(0, 9)), max_size=8), st.floats(0, 0.9))
def test_kept_boxes_are_apart_and_every_dropped_one_has_a_better_neighbour(found, most):
    detections = [Detection(score / 10, box) for box, score in found]
    kept = non_maximum_suppression(detections, most)
    assert all(iou(a.box, b.box) <= most for a in kept for b in kept if a is not b)
    for dropped in detections:
        assert dropped in kept or any(k.score >= dropped.score and iou(k.box, dropped.box) > most for k in kept)


def test_components_touching_at_a_corner_are_two():
    grid = np.zeros((4, 5), bool)
    grid[0, :2] = grid[1, 2] = grid[2:, 4] = True
    assert component_boxes(grid) == [(0, 0, 2, 1), (2, 1, 3, 2), (4, 2, 5, 4)]


def test_every_true_box_gets_its_best_match():
    assert best_overlaps([(0, 0, 2, 2), (5, 5, 6, 6)], [(0, 0, 2, 1), (0, 0, 2, 2)]) == [1, 0]
    assert best_overlaps([(0, 0, 2, 2)], []) == [0]
