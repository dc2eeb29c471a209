# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch

from anabranch.allocate.clusters.features import Scaler, row_keys
from anabranch.allocate.clusters.record import Clustering, nearest_labels
from anabranch.errors import AnabranchError, UsageError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_record(centroids, metric, log_bias=None, **fields):
    dim = centroids.shape[1]
    scaler = Scaler(
        num_features=dim, kept=torch.arange(dim), mean=torch.zeros(dim), std=torch.ones(dim), l2=metric == "cosine"
    )
    config = {"epsilon": 0.1}
    return Clustering(
        centroids=centroids,
        log_bias=log_bias,
        scaler=scaler,
        metric=metric,
        method="m",
        config=config,
        seed=0,
        **fields,
    )


def slow_assign(features, centroids, metric):
    """Straight loops over the definition."""
    rows = []
    for x in features.double():
        if metric == "cosine":
            distances = [1 - float(x @ c) / float(x.norm()) for c in centroids.double()]
        else:
            distances = [float((x - c).norm()) for c in centroids.double()]
        first, second = sorted(distances)[:2]
        rows.append((distances.index(first), first, second - first))
    return zip(*rows, strict=True)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_assign_gives_label_distance_and_margin_of_the_definition(metric):
    features = torch.randn(60, 5, generator=seeded())
    centroids = torch.randn(4, 5, generator=seeded(1))
    if metric == "cosine":
        centroids = torch.nn.functional.normalize(centroids, dim=1)
    found = plain_record(centroids, metric).assign(features)
    labels, distance, margin = slow_assign(features, centroids, metric)
    assert found.labels.tolist() == list(labels)
    torch.testing.assert_close(found.distance, torch.tensor(distance), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.margin, torch.tensor(margin), atol=1e-5, rtol=0)


def test_new_rows_are_assigned_without_the_bias_and_training_rows_with_it():
    clustering = plain_record(torch.eye(2), "cosine", log_bias=torch.tensor([0.0, 50.0]))
    row = torch.tensor([[1.0, 0.5]])
    assert clustering.assign(row).labels.tolist() == [0]
    assert clustering.training_labels(row).tolist() == [1]


def test_one_cluster_has_no_border():
    found = plain_record(torch.eye(2)[:1], "cosine").assign(torch.randn(5, 2, generator=seeded()))
    assert found.labels.tolist() == [0] * 5
    assert found.margin.isinf().all()


def test_no_rows_give_no_labels():
    clustering = plain_record(torch.eye(3), "euclidean")
    assert clustering.assign(torch.zeros(0, 3)).labels.shape == (0,)
    assert nearest_labels(torch.zeros(0, 3), torch.eye(3), "euclidean").shape == (0,)


def test_half_precision_features_and_features_with_gradients_are_assigned_in_float32():
    clustering = plain_record(torch.eye(3), "cosine")
    features = torch.randn(20, 3, generator=seeded())
    assert clustering.assign(features.bfloat16()).distance.dtype == torch.float32
    assert torch.equal(clustering.assign(features.requires_grad_()).labels, features.argmax(1))


def test_features_of_another_width_are_refused():
    with pytest.raises(UsageError, match=r"expected: \(rows, 3\)\n  received: \(4, 7\)"):
        plain_record(torch.eye(3), "cosine").assign(torch.zeros(4, 7))


@pytest.mark.parametrize("name", ["clusters.safetensors", "clusters.json"])
def test_a_folder_without_clusters_says_what_it_probably_is(name, tmp_path):
    plain_record(torch.eye(3), "cosine").save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"has no {name}: it is a TokenMoE or a partial run"):
        Clustering.load(tmp_path)


@pytest.mark.parametrize("name", ["clusters.safetensors", "clusters.json"])
def test_damaged_clusters_are_an_error_that_names_the_folder(name, tmp_path):
    plain_record(torch.eye(3), "cosine").save(tmp_path)
    (tmp_path / name).write_bytes(b"{ not this")
    with pytest.raises(AnabranchError, match=f"the clusters in {tmp_path} cannot be read"):
        Clustering.load(tmp_path)


def test_clusters_of_another_format_are_refused(tmp_path):
    plain_record(torch.eye(3), "cosine").save(tmp_path)
    path = tmp_path / "clusters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "anabranch.clusters/9"}))
    with pytest.raises(AnabranchError, match=r"another format[\s\S]*received: anabranch.clusters/9"):
        Clustering.load(tmp_path)


def test_row_keys_depend_on_content_only():
    rows = torch.randn(500, 12, generator=seeded())
    keys = row_keys(rows)
    assert len(keys.unique()) == 500
    order = torch.randperm(500, generator=seeded(1))
    assert torch.equal(row_keys(rows[order], chunk_rows=7), keys[order])
    assert torch.equal(row_keys(torch.tensor([[0.0, 1.0]])), row_keys(torch.tensor([[-0.0, 1.0]])))


def test_health_line_reads_like_a_sentence():
    health = {
        "min_size": 3,
        "median_size": 4,
        "max_size": 5,
        "effective_clusters": 2.96,
        "border_share": 0.125,
        "rank": 6,
    }
    line = plain_record(torch.eye(3), "cosine", health=health).health_line
    assert line == "3 clusters of 3-5 images (median 4, effective 3.0), 12.5% at a border, feature rank 6"
    assert math.isfinite(len(line))
