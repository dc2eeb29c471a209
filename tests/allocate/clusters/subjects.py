# SPDX-License-Identifier: Apache-2.0
"""How what divides data into groups is exercised."""

import torch

from anabranch.allocate.clusters import capacity, groups, kmeans, sinkhorn, tree
from anabranch.allocate.clusters.record import Clustering
from anabranch.testing import Reordering, Subject, along


def rows(g, count=48, kinds=4, width=6):
    """Around as many directions as there are kinds."""
    return 3 * torch.eye(width)[torch.arange(count) % kinds] + torch.randn(count, width, generator=g)


def clustering(method, **settings) -> Subject:
    def reload(output, folder):
        output.save(folder)
        return Clustering.load(folder)

    return Subject(
        inputs=lambda g: {
            "features": rows(g), "config": method.Config(num_clusters=4, min_rank=2, **settings), "generator": g,
        },
        call=method.fit,
        samples=along(48, {"features": 0}, {"labels": 0}),
        reload=reload,
    )  # fmt: skip


def in_pairs(count, compared) -> Reordering:
    """Of clusters: groups and branches are numbered by the first cluster of each, so pairs of clusters are compared."""
    return Reordering(
        size=count,
        inputs=along(count, {"centroids": 0, "sizes": 0}).inputs,
        output=lambda pairs_KK, order: pairs_KK[order][:, order],
        compared=compared,
    )


def subject_kmeans() -> Subject:
    return clustering(kmeans, restarts=2)


def subject_sinkhorn() -> Subject:
    return clustering(sinkhorn, rounds=4, capacity_factor=1.1)


def subject_capacity() -> Subject:
    return Subject(
        inputs=lambda g: {"scores": torch.randn(20, 4, generator=g), "capacity": 6, "minimum": 4},
        call=capacity.capacity_labels,
        samples=along(20, {"scores": 0}, {"": 0}),
    )


def subject_groups() -> Subject:
    return Subject(
        inputs=lambda g: {
            "centroids": rows(g, 6, 3), "sizes": torch.randint(10, 20, (6,), generator=g), "num_groups": 3,
            "generator": g,
        },
        call=groups.group_clusters,
        samples=in_pairs(6, lambda groups_K: groups_K[:, None] == groups_K),
    )  # fmt: skip


def subject_tree() -> Subject:
    def shared(digits_KS):
        """Levels that two paths have in common from the root on."""
        return (digits_KS[:, None] == digits_KS).long().cumprod(-1).sum(-1)

    return Subject(
        inputs=lambda g: {
            "centroids": rows(g, 6, 3), "sizes": torch.randint(10, 20, (6,), generator=g), "groups": 2, "depth": 3,
            "generator": g,
        },
        call=tree.grow,
        samples=in_pairs(6, shared),
    )  # fmt: skip
