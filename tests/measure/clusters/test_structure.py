# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from anabranch.errors import UsageError
from anabranch.measure.clusters.structure import StructureRow, StructureTable, one_blob, purity, structure_table


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kmeans(points, num_clusters, generator):
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    return torch.from_numpy(KMeans(num_clusters, n_init=3, random_state=seed).fit_predict(points.numpy())).long()


def four_blobs(per_blob=60):
    """Three near one another, one far away: the coarse cut is real as well."""
    centres = torch.tensor([[0.0, 0], [8, 0], [4, 7], [20, 20]])
    return centres.repeat_interleave(per_blob, 0) + torch.randn(4 * per_blob, 2, generator=seeded())


def test_four_blobs_stand_out_and_their_number_is_found():
    table = structure_table(four_blobs(), [2, 3, 4, 5, 6], kmeans, seeded(), num_references=5)
    assert table.num_clusters == 4
    assert next(row.z for row in table.rows if row.num_clusters == 4) > 10
    assert table.sentence.startswith("4 groups: silhouette 0.")


def test_one_gaussian_has_a_silhouette_that_looks_like_structure_but_is_none():
    points = torch.randn(300, 2, generator=seeded(3)) * torch.tensor([2.0, 1.0])
    table = structure_table(points, [2, 3, 4], kmeans, seeded())
    assert max(row.silhouette for row in table.rows) > 0.3
    assert table.num_clusters is None
    assert table.sentence == "no structure beyond one blob"


def test_the_reference_has_the_mean_and_the_covariance_of_the_data():
    points = torch.randn(1500, 3, generator=seeded()) @ torch.tensor([[1.0, 0.5, 0], [0, 2, 0], [1, 0, 0.1]]) + 7
    blobs = torch.stack([one_blob(points, seeded(seed)) for seed in range(8)]).flatten(0, 1)
    torch.testing.assert_close(blobs.mean(0), points.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(blobs.T), torch.cov(points.T), atol=0.15, rtol=0.05)


def test_a_large_set_is_judged_on_a_sample():
    seen = []

    def counting(points, num_clusters, generator):
        seen.append(len(points))
        return kmeans(points, num_clusters, generator)

    structure_table(four_blobs(), [2], counting, seeded(), num_references=2, max_points=100)
    assert seen == [100, 100, 100]


def test_the_largest_silhouette_wins_among_those_that_stand_out():
    rows = [
        StructureRow(num_clusters=2, silhouette=0.9, reference_mean=0.89, reference_sd=0.01),
        StructureRow(num_clusters=3, silhouette=0.6, reference_mean=0.3, reference_sd=0.01),
        StructureRow(num_clusters=4, silhouette=0.7, reference_mean=0.3, reference_sd=0.01),
    ]
    assert StructureTable(rows=tuple(rows)).num_clusters == 4
    assert rows[1].z == pytest.approx(30)


def test_too_few_references_or_clusters_are_refused():
    with pytest.raises(UsageError, match="two references"):
        structure_table(four_blobs(), [2], kmeans, seeded(), num_references=1)
    with pytest.raises(UsageError, match=r"received: \[1, 2\]"):
        structure_table(four_blobs(), [1, 2], kmeans, seeded())


def slow_purity(labels, reference):
    kept = 0
    for cluster in set(labels):
        members = [r for a, r in zip(labels, reference, strict=True) if a == cluster]
        kept += max(members.count(r) for r in members)
    return kept / len(labels)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40))
def test_purity_is_the_share_of_the_majority_and_ignores_names(pairs):
    labels, reference = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = purity(labels, reference)
    assert found == pytest.approx(slow_purity(labels.tolist(), reference.tolist()))
    assert purity(9 - labels, 5 * reference) == pytest.approx(found)
    assert purity(reference, reference) == 1


def test_purity_of_labellings_of_different_sets_is_refused():
    with pytest.raises(UsageError, match="expected: 3 labels\n  received: 2"):
        purity(torch.zeros(3), torch.zeros(2))
