# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.allocate.clusters.features import FeatureConfig, check_rank, fit_scaler, prepare


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_scaler_standardises_with_the_population_deviation_and_keeps_what_it_is_told():
    features = torch.randn(100, 3, generator=seeded()) * torch.tensor([1.0, 10, 100]) + 5
    scaled = fit_scaler(features, FeatureConfig(num_clusters=1, l2=False)).transform(features)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.square().mean(0), torch.ones(3))
    raw = fit_scaler(features, FeatureConfig(num_clusters=1, l2=False, standardize=False))
    assert torch.equal(raw.transform(features), features)
    sphere = fit_scaler(features, FeatureConfig(num_clusters=1)).transform(features)
    torch.testing.assert_close(sphere.norm(dim=1), torch.ones(100))


def test_a_row_at_the_mean_has_no_direction_and_stays_finite():
    features = torch.tensor([[-1.0, -1], [0, 0], [1, 1]])
    assert fit_scaler(features, FeatureConfig(num_clusters=1)).transform(features)[1].tolist() == [0, 0]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_counts_directions_that_hold_95_percent(rank):
    features = torch.randn(500, rank, generator=seeded()) @ torch.randn(rank, 20, generator=seeded(1))
    features = features + 1e-3 * torch.randn(500, 20, generator=seeded(2))
    scaler = fit_scaler(features, FeatureConfig(num_clusters=1, standardize=False))
    assert rank - 1 <= check_rank(features, scaler, min_rank=1) <= rank


def test_two_features_cannot_have_rank_five_and_pass():
    features = torch.randn(100, 2, generator=seeded())
    assert prepare(features, FeatureConfig(num_clusters=3), seeded()).health["rank"] == 2


def test_prepared_rows_do_not_depend_on_the_order_they_came_in():
    features = torch.randn(50, 6, generator=seeded())
    order = torch.randperm(50, generator=seeded(1))
    for sample_size in (20, 50):
        config = FeatureConfig(num_clusters=3, sample_size=sample_size)
        plain, shuffled = prepare(features, config, seeded()), prepare(features[order], config, seeded())
        assert torch.equal(plain.x, shuffled.x)
        assert torch.equal(plain.rows, order[shuffled.rows])
        assert len(plain.x) == sample_size
