# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from anabranch.errors import UsageError
from anabranch.measure.probes import ProbeConfig, draw_labels, probe, split, standardise


@pytest.fixture
def task():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 100)
    features = generator.normal(size=(400, 6)) + 6 * np.eye(4, 6)[labels]
    return features, labels, split(labels, 0.5, seed=0)


def test_separable_features_score_a_hundred_and_shuffled_labels_chance(task):
    features, labels, is_test = task
    config = ProbeConfig(num_labels=80)
    for name, scores in probe(features, labels, is_test, config, seed=0).items():
        assert scores.accuracy > 98, name
        assert scores.accuracy == pytest.approx((scores.choose + scores.report) / 2)
    shuffled = np.random.default_rng(1).permutation(labels)
    for name, scores in probe(features, shuffled, is_test, config, seed=0).items():
        assert 10 < scores.accuracy < 40, name


def test_scale_and_shift_of_a_feature_change_nothing(task):
    features, labels, is_test = task
    noisy = features + np.random.default_rng(2).normal(size=features.shape) * 4
    moved = noisy * np.array([1e-4, 1, 1e4, 2, 3, 4]) + np.array([5, -3, 1e4, 0, 0, 0])
    config = ProbeConfig(num_labels=60)
    assert probe(noisy, labels, is_test, config, seed=0) == probe(moved, labels, is_test, config, seed=0)


def test_constant_features_are_ignored(task):
    features, labels, is_test = task
    dull = np.concatenate([features, np.full((400, 2), 7.0)], 1)
    config = ProbeConfig(num_labels=60)
    assert probe(dull, labels, is_test, config, seed=0) == probe(features, labels, is_test, config, seed=0)


def test_test_labels_are_never_read_for_fitting(task):
    """Poison the labels that may only be scored: predictions must not move."""
    _, labels, is_test = task
    drawn = draw_labels(labels, ~is_test, 40, np.random.default_rng(0))
    assert not is_test[drawn].any()
    poisoned = np.where(is_test, 0, labels)
    again = draw_labels(poisoned, ~is_test, 40, np.random.default_rng(0))
    assert np.array_equal(drawn, again)
    assert len(np.unique(drawn)) == len(drawn)


def test_labels_are_drawn_evenly_and_every_class_once_at_least():
    labels = np.array([0] * 50 + [1] * 50 + [2])
    drawn = draw_labels(labels, np.ones(101, bool), 21, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() == [10, 10, 1]
    assert sorted(labels[draw_labels(labels, np.ones(101, bool), 1, np.random.default_rng(0))]) == [0, 1, 2]


def test_same_seed_same_labels_other_seed_other_labels(task):
    features, labels, is_test = task
    noisy = features + np.random.default_rng(2).normal(size=features.shape) * 6
    one, two, other = (probe(noisy, labels, is_test, ProbeConfig(num_labels=30), seed=s) for s in (0, 0, 1))
    assert one == two
    assert one != other


def test_a_split_leaves_every_class_on_both_sides():
    labels = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    is_test = split(labels, 0.3, seed=0)
    assert set(labels[is_test]) == set(labels[~is_test]) == {0, 1}


def test_wrong_tasks_and_features(task):
    features, labels, is_test = task
    with pytest.raises(UsageError, match="at least two classes"):
        probe(features, np.zeros(400, int), is_test, ProbeConfig(), seed=0)
    with pytest.raises(UsageError, match="class 3 of the task has test images only"):
        probe(features, labels, is_test | (labels == 3), ProbeConfig(), seed=0)
    with pytest.raises(UsageError, match="not finite"):
        standardise(np.where(features > 6, np.nan, features), np.arange(10))
    with pytest.raises(ValueError, match="num_draws: expected at least 1, received 0"):
        ProbeConfig(num_draws=0)
