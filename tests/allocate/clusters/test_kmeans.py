# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from anabranch.allocate.clusters.kmeans import Config, fit, lloyd


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(**options):
    return Config(standardize=False, l2=False, min_rank=1, **options)


def test_one_cluster_has_the_total_variance_and_as_many_as_rows_have_none():
    features = torch.randn(30, 4, generator=seeded())
    total = (features - features.mean(0)).square().sum().item()
    assert fit(features, plain(num_clusters=1), seeded()).health["inertia"] == pytest.approx(total, rel=1e-5)
    everyone = fit(features, plain(num_clusters=30), seeded())
    assert everyone.health["inertia"] == pytest.approx(0, abs=1e-9)
    assert everyone.sizes.tolist() == [1] * 30


def test_inertia_is_the_sum_of_squared_distances_of_the_assignment():
    features = torch.randn(200, 4, generator=seeded())
    clustering = fit(features, plain(num_clusters=5), seeded())
    by_hand = sum(
        float((features[n] - clustering.centroids[a]).square().sum()) for n, a in enumerate(clustering.labels)
    )
    assert clustering.health["inertia"] == pytest.approx(by_hand, rel=1e-4)
    assert clustering.assign(features).distance.square().sum().item() == pytest.approx(by_hand, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), K=st.integers(1, 6))
def test_more_iterations_never_raise_the_inertia(seed, K):
    x = torch.randn(60, 3, generator=seeded(seed))
    course = [lloyd(x, K, seeded(seed), restarts=1, max_iterations=i)[1] for i in (1, 2, 4, 50)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(course))


def test_restarts_find_four_clear_blobs():
    corners = torch.tensor([[0.0, 0], [0, 6], [6, 0], [30, 30]])
    truth = torch.arange(4).repeat_interleave(100)
    features = corners[truth] + torch.randn(400, 2, generator=seeded())
    assert adjusted_rand_score(truth, fit(features, plain(num_clusters=4), seeded()).labels) > 0.99
