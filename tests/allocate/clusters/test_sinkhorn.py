# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from anabranch.allocate.clusters import kmeans
from anabranch.allocate.clusters.sinkhorn import Config, fit, sinkhorn_plan
from anabranch.errors import UsageError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosines(N, K, seed=0, dim=8):
    points = torch.nn.functional.normalize(torch.randn(N + K, dim, generator=seeded(seed)), dim=1)
    return points[:N] @ points[N:].T


def log_sinkhorn(scores, epsilon, iterations, target):
    """The same plan from the definition: log-sum-exp throughout, in float64."""
    logits = scores.double() / epsilon
    log_v = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        log_u = -math.log(len(scores)) - torch.logsumexp(logits + log_v, 1)
        log_v = target.double().log() - torch.logsumexp(logits + log_u[:, None], 0)
    log_u = -math.log(len(scores)) - torch.logsumexp(logits + log_v, 1)
    return (logits + log_u[:, None] + log_v).exp()


def uneven_groups(noise=0.15):
    """Three clear groups of 800, 150 and 50 around orthogonal directions."""
    truth = torch.repeat_interleave(torch.arange(3), torch.tensor([800, 150, 50]))
    return torch.eye(3)[truth] + noise * torch.randn(1000, 3, generator=seeded()), truth


def test_two_points_and_two_centroids_have_the_closed_form():
    (a, b), (c, d) = (2.0, 1.0), (1.0, 3.0)
    scores = torch.tensor([[a, b], [c, d]]).log()
    plan = sinkhorn_plan(scores, epsilon=1.0, iterations=2000, tolerance=1e-7).matrix(scores, 1.0)
    expected = math.sqrt(a * d) / (2 * (math.sqrt(a * d) + math.sqrt(b * c)))
    assert expected == pytest.approx(0.355051, abs=1e-6)
    torch.testing.assert_close(plan, torch.tensor([[expected, 0.5 - expected], [0.5 - expected, expected]]))


@pytest.mark.parametrize(("epsilon", "tolerance"), [(0.2, 1e-5), (0.05, 1e-5), (0.01, 1e-4), (0.001, 1e-3)])
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_the_scaling_form_equals_the_log_form(epsilon, tolerance, iterations):
    """Dividing float32 cosines by epsilon magnifies their rounding, hence the tolerance."""
    scores, target = cosines(300, 7), torch.tensor([4.0, 3, 2, 1, 1, 1, 1]) / 13
    plan = sinkhorn_plan(scores, epsilon, iterations, tolerance=0.0, target=target)
    assert plan.iterations == iterations
    difference = plan.matrix(scores, epsilon) - log_sinkhorn(scores, epsilon, iterations, target)
    assert difference.abs().max().item() * len(scores) < tolerance


@settings(max_examples=200, deadline=None)
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 8),
    epsilon=st.sampled_from([1e-4, 1e-3, 0.01, 0.05, 0.5]),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**31 - 1),
)
def test_rows_are_exact_columns_within_the_stated_error_and_nothing_is_nan(N, K, epsilon, shift, seed):
    scores = cosines(N, K, seed)
    plan = sinkhorn_plan(scores, epsilon, iterations=60)
    matrix = plan.matrix(scores, epsilon).double()
    rounding = 1e-6 / epsilon
    assert torch.isfinite(matrix).all()
    assert (matrix.sum(1) * N - 1).abs().max() < 1e-4 + rounding
    assert (matrix.sum(0) * K - 1).abs().max().item() == pytest.approx(plan.error, abs=1e-4 + rounding)
    if epsilon >= 0.05:
        moved = sinkhorn_plan(scores + shift, epsilon, iterations=60).matrix(scores + shift, epsilon)
        assert (moved - matrix).abs().max() * N < 1e-3  # float32 keeps 1e-6 of a cosine beside a shift of 50


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_permuting_points_and_clusters_permutes_the_plan(seed):
    scores = cosines(30, 5, seed)
    rows, columns = torch.randperm(30, generator=seeded(seed)), torch.randperm(5, generator=seeded(seed))
    plain = sinkhorn_plan(scores, 0.05, 20, 0.0).matrix(scores, 0.05)
    turned = scores[rows][:, columns]
    torch.testing.assert_close(sinkhorn_plan(turned, 0.05, 20, 0.0).matrix(turned, 0.05), plain[rows][:, columns])


def test_one_cluster_takes_everything():
    scores = cosines(12, 1)
    torch.testing.assert_close(sinkhorn_plan(scores, 0.05).matrix(scores, 0.05), torch.full((12, 1), 1 / 12))


def test_a_small_epsilon_comes_to_a_balanced_hard_assignment():
    scores = cosines(60, 3)
    matrix = sinkhorn_plan(scores, 0.002, iterations=20_000, tolerance=1e-3).matrix(scores, 0.002)
    assert torch.bincount(matrix.argmax(1)).tolist() == [20, 20, 20]
    assert (matrix.amax(1) * 60).median() > 0.999


def test_a_warm_start_needs_fewer_iterations():
    scores = cosines(400, 6)
    cold = sinkhorn_plan(scores, 0.02)
    assert sinkhorn_plan(scores, 0.02, log_v=cold.log_v).iterations < cold.iterations


def test_three_iterations_do_not_balance_and_the_error_says_so():
    x, _ = uneven_groups()
    scores = torch.nn.functional.normalize(x, dim=1) @ torch.eye(3)
    assert sinkhorn_plan(scores, 0.05, iterations=3).error > 0.2
    assert sinkhorn_plan(scores, 0.05, iterations=1000).error < 1e-3


def test_hard_sizes_are_balanced_by_default():
    shares = torch.tensor([8.0, 4, 2, 1, 1])
    truth = torch.multinomial(shares, 2000, replacement=True, generator=seeded())
    features = torch.randn(5, 10, generator=seeded(1))[truth] + 0.8 * torch.randn(2000, 10, generator=seeded(2))
    balanced = fit(features, Config(num_clusters=8), seeded())
    assert balanced.sizes.max() <= 1.5 * balanced.sizes.min()
    assert balanced.health["column_error"] < 1e-3
    plain = kmeans.fit(features, kmeans.Config(num_clusters=8), seeded())
    assert plain.sizes.max() > 1.5 * plain.sizes.min()  # so the balance is the plan's doing


def test_a_too_large_epsilon_is_refused_by_its_hard_sizes():
    features = torch.randn(1000, 8, generator=seeded()) * torch.tensor([6.0, 1, 1, 1, 1, 1, 1, 1]) + 3
    with pytest.raises(
        UsageError, match=r"epsilon 1.0 is too large[\s\S]*within a factor of 3[\s\S]*capacity_factor 1.1"
    ):
        fit(features, Config(num_clusters=6, epsilon=1.0, standardize=False, min_rank=1), seeded())
    config = Config(num_clusters=6, epsilon=1.0, standardize=False, min_rank=1, capacity_factor=1.1)
    sizes = fit(features, config, seeded()).sizes
    assert sizes.max() <= math.ceil(1.1 * 1000 / 6)
    assert sizes.min() >= 1000 // 12


def test_balance_that_tears_groups_apart_is_found_and_said():
    features, truth = uneven_groups()
    options = {"num_clusters": 3, "standardize": False, "min_rank": 1}
    plain = kmeans.fit(features, kmeans.Config(**options), seeded())
    assert adjusted_rand_score(truth, plain.labels) == 1
    balanced = fit(features, Config(capacity_factor=1.0, **options), seeded())
    assert sorted(balanced.sizes.tolist()) in ([332, 334, 334], [333, 333, 334])
    assert adjusted_rand_score(truth, balanced.labels) < 0.2
    assert balanced.health["purity_vs_kmeans"] == pytest.approx(0.81, abs=0.02)
    assert "balance splits and mixes natural groups" in balanced.health["warnings"][0]


def test_the_mixed_target_gives_way_to_natural_sizes():
    features, truth = uneven_groups()
    options = {"num_clusters": 3, "standardize": False, "min_rank": 1, "epsilon": 0.01, "max_size_ratio": 100.0}
    sizes = [fit(features, Config(target_alpha=alpha, **options), seeded()).sizes.max() for alpha in (1.0, 0.5, 0.0)]
    assert sizes[0] < sizes[1] < sizes[2]
    natural = fit(features, Config(target_alpha=0.0, **options), seeded())
    assert adjusted_rand_score(truth, natural.labels) > 0.98
    assert not [warning for warning in natural.health["warnings"] if "natural" in warning]


def test_the_rest_of_a_stream_keeps_its_balance_only_with_the_bias():
    shares = torch.arange(1.0, 13)
    truth = torch.multinomial(shares, 12_000, replacement=True, generator=seeded())
    features = torch.randn(12, 16, generator=seeded(1))[truth] + 0.6 * torch.randn(12_000, 16, generator=seeded(2))
    clustering = fit(features, Config(num_clusters=8, sample_size=3000), seeded())
    with_bias = torch.bincount(clustering.labels, minlength=8) / 1500
    without = torch.bincount(clustering.assign(features).labels, minlength=8) / 1500
    assert with_bias.max() / with_bias.min() < 1.3
    assert without.max() / without.min() > 1.5


def test_exact_balance_is_exact():
    features = torch.randn(1000, 8, generator=seeded())
    assert fit(features, Config(num_clusters=10, capacity_factor=1.0), seeded()).sizes.tolist() == [100] * 10


@pytest.mark.slow
def test_twelve_thousand_rows_of_three_hundred_features_fit_in_seconds():
    features = torch.randn(12_000, 300, generator=seeded())
    clustering = fit(features, Config(num_clusters=12), seeded())
    assert clustering.sizes.max() <= 1.5 * clustering.sizes.min()
    assert "not a discovery" in clustering.health["warnings"][0]
