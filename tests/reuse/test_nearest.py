# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.reuse.nearest import best, leave_one_out, margin


def slow_leave_one_out(features, labels):
    unit = [[v / math.sqrt(sum(x * x for x in row)) for v in row] for row in features.double().tolist()]
    labels = labels.tolist()
    k = min(20, min(labels.count(c) for c in set(labels)))
    right = []
    for i, row in enumerate(unit):
        near = sorted(
            ((sum(a * b for a, b in zip(row, other, strict=True)), j) for j, other in enumerate(unit) if j != i),
            reverse=True,
        )[:k]
        votes = {}
        for cosine, j in near:
            votes[labels[j]] = votes.get(labels[j], 0) + math.exp(cosine / 0.07)
        right.append(max(votes, key=votes.get) == labels[i])
    return right


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 4), st.integers(2, 8), st.integers(2, 6), st.integers(0, 2**31 - 1))
def test_neighbours_vote_as_in_the_slow_loop(classes, each, width, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    features = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    assert leave_one_out(features, labels).tolist() == slow_leave_one_out(features, labels)


def test_separate_classes_are_all_right():
    labels = torch.arange(3).repeat_interleave(30)
    assert leave_one_out(torch.eye(3)[labels] + 0.01 * torch.randn(90, 3), labels).all()


def test_shuffled_labels_show_no_preference():
    """Sixteen models whose features know nothing of the labels: the best of them must not count as better."""
    generator = torch.Generator().manual_seed(0)
    shown = 0
    for _ in range(40):
        labels = torch.randint(0, 5, (300,), generator=generator)
        right = [leave_one_out(torch.randn(300, 8, generator=generator), labels) for _ in range(17)]
        winner = best([float(r.float().mean()) for r in right])
        assert 0.1 < right[winner].float().mean() < 0.35
        shown += winner != 0 and margin(right[winner], right[0], 17).shown
    assert shown <= 6  # 40 times 5 % are 2


def test_a_clear_winner_is_shown():
    right, other = torch.arange(400) % 10 > 0, torch.arange(400) % 10 > 3
    found = margin(right, other, 17)
    assert found.mean == pytest.approx(30)
    assert found.shown


def test_the_plain_model_wins_a_tie():
    assert best([0.5, 0.5, 0.4]) == 0


def test_one_class_is_no_task():
    with pytest.raises(ValueError, match="labels: expected at least two classes of two images, received 1 classes"):
        leave_one_out(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
