# SPDX-License-Identifier: Apache-2.0
"""What every clusterer promises, whatever its method."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from anabranch.allocate.clusters import kmeans, sinkhorn
from anabranch.allocate.clusters.record import Clustering
from anabranch.errors import UsageError

BOTH = pytest.mark.parametrize("method", [kmeans, sinkhorn])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def groups_on_a_sphere(sizes, dim=8, noise=0.3, seed=0):
    """Rows around orthogonal directions: `len(sizes)` groups that any clusterer should see."""
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.eye(dim)[truth] + noise * torch.randn(len(truth), dim, generator=seeded(seed)), truth


def same_partition(labels, others):
    return len(torch.stack([labels, others]).unique(dim=1).T) == len(labels.unique()) == len(others.unique())


@BOTH
def test_shuffling_the_rows_permutes_the_labels_and_changes_nothing_else(method):
    features, _ = groups_on_a_sphere([90, 80, 70, 60])
    order = torch.randperm(len(features), generator=seeded(1))
    config = method.Config(num_clusters=5)
    plain, shuffled = method.fit(features, config, seeded()), method.fit(features[order], config, seeded())
    assert torch.equal(shuffled.labels, plain.labels[order])
    assert torch.equal(shuffled.centroids, plain.centroids)
    assert shuffled.health == plain.health


@BOTH
def test_a_duplicate_row_gets_the_label_of_its_twin(method):
    features, _ = groups_on_a_sphere([60, 60, 60])
    clustering = method.fit(torch.cat([features, features[:40]]), method.Config(num_clusters=3), seeded())
    assert torch.equal(clustering.labels[180:], clustering.labels[:40])
    assert any("duplicates" in warning for warning in clustering.health["warnings"])


@BOTH
def test_rotating_and_shifting_the_features_leaves_the_partition(method):
    features, _ = groups_on_a_sphere([60, 50, 40], noise=0.1)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=seeded(3)))
    l2 = method is sinkhorn  # cosines turn with the features but do not shift with them
    config = method.Config(num_clusters=3, standardize=False, l2=l2, min_rank=1)
    moved = features @ rotation + (0 if l2 else 7)
    plain, turned = method.fit(features, config, seeded()), method.fit(moved, config, seeded())
    assert same_partition(plain.labels, turned.labels)


@BOTH
def test_clear_groups_of_equal_size_are_found(method):
    features, truth = groups_on_a_sphere([50, 50, 50, 50], noise=0.1)
    clustering = method.fit(features, method.Config(num_clusters=4, min_rank=1), seeded())
    assert same_partition(clustering.labels, truth)
    assert clustering.sizes.tolist() == [50, 50, 50, 50]


@BOTH
def test_the_record_states_how_often_assign_agrees_with_the_training_labels(method):
    features, _ = groups_on_a_sphere([200, 100, 50, 50])
    clustering = method.fit(features, method.Config(num_clusters=6), seeded())
    agreement = (clustering.assign(features).labels == clustering.labels).float().mean().item()
    assert clustering.health["assign_agreement"] == agreement
    assert torch.equal(clustering.training_labels(features), clustering.labels)


@BOTH
def test_chunks_never_change_a_label(method):
    features, _ = groups_on_a_sphere([40, 30, 30])
    clustering = method.fit(features, method.Config(num_clusters=3), seeded())
    whole = clustering.assign(features)
    for chunk_rows in (1, 7, len(features)):
        assert torch.equal(clustering.training_labels(features, chunk_rows), clustering.labels)
        parts = clustering.assign(features, chunk_rows)
        assert torch.equal(parts.labels, whole.labels)
        torch.testing.assert_close(parts.margin, whole.margin, atol=1e-5, rtol=0)


@BOTH
def test_a_set_larger_than_the_sample_is_labelled_whole(method):
    features, truth = groups_on_a_sphere([300, 300, 300], noise=0.1)
    config = method.Config(num_clusters=3, sample_size=200, min_rank=1)
    clustering = method.fit(features, config, seeded())
    assert adjusted_rand_score(truth, clustering.labels) > 0.9  # balance within the sample may cut a group's edge off
    head = torch.cat([*clustering.training_chunks(features[:400], 100)])
    rest = torch.cat([*clustering.training_chunks(features, 100, start=400)])
    assert torch.equal(torch.cat([head, rest]), clustering.labels)


@BOTH
def test_saved_and_loaded_clusters_are_equal_to_the_bit(method, tmp_path):
    features, _ = groups_on_a_sphere([40, 30, 30])
    features[:, 3] = 5.0
    clustering = method.fit(features, method.Config(num_clusters=3), seeded())
    clustering.save(tmp_path)
    again = Clustering.load(tmp_path)
    for name in ("centroids", "sizes", "labels"):
        assert torch.equal(getattr(again, name), getattr(clustering, name))
    new = torch.randn(50, 8, generator=seeded(9))
    for mine, theirs in zip(again.assign(new), clustering.assign(new), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(again.training_labels(features), clustering.labels)
    for name in ("metric", "method", "config", "seed", "feature_name", "encoder_sha256", "health", "health_line"):
        assert getattr(again, name) == getattr(clustering, name)


@BOTH
def test_the_same_seed_gives_the_same_clusters_and_leaves_the_global_generator_alone(method):
    features = torch.randn(300, 8, generator=seeded())
    before = torch.get_rng_state()
    config = method.Config(num_clusters=6)
    one, two = method.fit(features, config, seeded(5)), method.fit(features, config, seeded(5))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.centroids, two.centroids)
    assert one.seed == 5
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_constant_features_are_dropped_and_listed(method):
    features, _ = groups_on_a_sphere([40, 40])
    features[:, 2] = 1e4
    clustering = method.fit(features, method.Config(num_clusters=2), seeded())
    assert clustering.health["dropped_features"] == [2]
    features[:, 2] = -3.0
    assert torch.equal(clustering.assign(features).labels, clustering.assign(features.clone()).labels)
    assert clustering.centroids.shape == (2, 7)


@BOTH
def test_nan_is_refused_with_the_row_in_training_and_in_assignment(method):
    features, _ = groups_on_a_sphere([40, 40])
    clustering = method.fit(features, method.Config(num_clusters=2), seeded())
    features[11, 1] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinity"):
        method.fit(features, method.Config(num_clusters=2), seeded())
    with pytest.raises(UsageError, match="first 11"):
        clustering.assign(features)


@BOTH
def test_more_clusters_than_distinct_rows_names_both_numbers(method):
    features = torch.randn(6, 8, generator=seeded()).repeat(10, 1)
    with pytest.raises(UsageError, match=r"at least 7 distinct rows for 7 clusters\n  received: 6 distinct rows of 60"):
        method.fit(features, method.Config(num_clusters=7), seeded())


@BOTH
def test_collapsed_features_are_refused(method):
    line = torch.randn(200, 1, generator=seeded()) * torch.ones(1, 16)
    line = line + 1e-4 * torch.randn(200, 16, generator=seeded(1))
    with pytest.raises(UsageError, match=r"collapsed[\s\S]*received: 1 of 16"):
        method.fit(line, method.Config(num_clusters=4), seeded())
    assert method.fit(line, method.Config(num_clusters=2, min_rank=1), seeded()).health["rank"] == 1
    with pytest.raises(UsageError, match="every one is constant"):
        method.fit(torch.ones(50, 4), method.Config(num_clusters=1), seeded())


@BOTH
def test_few_images_a_cluster_warn_with_a_better_number(method):
    features = torch.randn(200, 8, generator=seeded())
    warnings = method.fit(features, method.Config(num_clusters=10), seeded()).health["warnings"]
    assert "200 images cannot feed 10 clusters; with 40 each use 5" in warnings


def test_wrong_options_say_what_was_expected_and_received():
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, received 0"):
        kmeans.Config(num_clusters=0)
    with pytest.raises(ValueError, match="restarts: expected at least 1, received 0"):
        kmeans.Config(num_clusters=2, restarts=0)
    with pytest.raises(ValueError, match="epsilon: expected above 0, received -1"):
        sinkhorn.Config(num_clusters=2, epsilon=-1)
    with pytest.raises(ValueError, match=r"target_alpha: expected 0\.\.1, received 2"):
        sinkhorn.Config(num_clusters=2, target_alpha=2)
    with pytest.raises(ValueError, match=r"capacity_factor: expected at least 1, received 0\.5"):
        sinkhorn.Config(num_clusters=2, capacity_factor=0.5)
    with pytest.raises(ValueError, match="l2: expected True"):
        sinkhorn.Config(num_clusters=2, l2=False)
