# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from anabranch.reuse.customize import along, choose, facts, histogram, path_votes

ROUTES = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])  # clusters 0 and 1 share their route


def labels(*counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_a_route_is_voted_for_by_all_its_clusters():
    task = labels(3, 3, 5, 1)
    assert choose(task, ROUTES, "cluster").path == (1, 1)
    chosen = choose(task, ROUTES, "path")
    assert (chosen.path, chosen.cluster, chosen.coverage) == ((0, 0), 0, pytest.approx(6 / 12))
    assert path_votes(histogram(task, 4), ROUTES) == {(0, 0): 6, (1, 1): 5, (1, 0): 1}


def test_entropy_of_one_cluster_and_of_all():
    assert choose(labels(9, 0, 0, 0), ROUTES, "path").entropy == 0
    assert choose(labels(2, 2, 2, 2), ROUTES, "path").entropy == pytest.approx(math.log(4))


def test_ties_are_told_and_go_to_the_smaller():
    task = labels(0, 4, 4, 0)
    chosen = choose(task, ROUTES, "path")
    assert chosen.path == (0, 0)
    assert any("clusters [1, 2] tie" in line for line in facts(chosen, torch.zeros(8), 1.0)["warnings"])


def test_low_coverage_and_foreign_images_are_told():
    routes = torch.arange(5)[None]
    chosen = choose(labels(3, 3, 2, 2, 2), routes, "path")
    said = facts(chosen, torch.full((12,), 2.0), training_p95=1.0)
    assert said["coverage"] == pytest.approx(0.25)
    assert any("25%" in line for line in said["warnings"])
    assert any("outside of what was learned" in line for line in said["warnings"])
    quiet = facts(choose(labels(9, 1, 1, 0, 0), routes, "path"), torch.zeros(11), 1.0)
    assert quiet["warnings"] == []
    assert [top["cluster"] for top in quiet["top_clusters"]] == [0, 1, 2]


def test_a_route_that_nobody_takes():
    with pytest.raises(ValueError, match=r"some cluster takes, received \(0, 1\)"):
        along((0, 1), torch.ones(4), ROUTES)
