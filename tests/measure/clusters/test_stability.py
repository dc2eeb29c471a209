# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from sklearn.cluster import KMeans

from anabranch.errors import UsageError
from anabranch.measure.clusters.stability import Stability, agreement, stability


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_first_coordinate(points, generator):
    return (points[:, 0] > 0).long()


def at_random(points, generator):
    return torch.randint(0, 4, (len(points),), generator=generator)


def one_start(num_clusters):
    def fit(points, generator):
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        model = KMeans(num_clusters, init="random", n_init=1, random_state=seed)
        return torch.from_numpy(model.fit_predict(points.numpy())).long()

    return fit


def test_a_rule_that_always_says_the_same_is_stable():
    found = stability(torch.randn(200, 2, generator=seeded()), by_first_coordinate, seeded())
    assert found.scores == (1.0,) * 20
    assert found.standard_error == 0
    assert found.warning is None


def test_independent_labels_have_no_stability_and_a_warning():
    found = stability(torch.randn(2000, 2, generator=seeded()), at_random, seeded())
    assert abs(found.mean) < 0.02
    assert found.warning.endswith("another seed would find other clusters, and so train other experts")


def test_only_the_points_of_both_subsamples_are_compared():
    """Points that one fit never saw would be labelled -1; counting them would make a random rule look stable."""
    found = stability(torch.randn(2000, 2, generator=seeded()), at_random, seeded(), share=0.6)
    assert abs(found.mean) < 0.02


def test_clear_blobs_are_more_stable_at_their_own_number_than_beside_it():
    centres = torch.tensor([[0.0, 0], [40, 0], [0, 40], [40, 40]])
    points = centres.repeat_interleave(50, 0) + torch.randn(200, 2, generator=seeded())
    coarse, blurred = (stability(points, one_start(count), seeded(), num_resamples=8) for count in (1, 6))
    assert coarse.mean == 1
    assert blurred.mean < 0.95


def test_agreement_ignores_the_names_of_the_clusters():
    labels = torch.randint(0, 5, (300,), generator=seeded())
    names = torch.tensor([7, 3, 9, 1, 4])
    assert agreement(labels, names[labels]) == 1
    assert agreement(labels, torch.randint(0, 5, (300,), generator=seeded(1))) == pytest.approx(0, abs=0.02)


def test_mean_and_standard_error_are_those_of_the_scores():
    found = Stability(scores=(0.2, 0.4, 0.6))
    assert found.mean == pytest.approx(0.4)
    assert found.standard_error == pytest.approx(0.2 / 3**0.5)


def test_subsamples_that_may_not_overlap_are_refused():
    with pytest.raises(UsageError, match=r"received: num_resamples 20, share 0\.3"):
        stability(torch.zeros(10, 2), at_random, seeded(), share=0.3)
