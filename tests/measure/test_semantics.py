# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from anabranch.measure.semantics import majority_expert, pixel_routing, routing_semantics


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 4, 300), generator.normal(size=(300 * 9, 2))


def test_a_router_that_copies_the_cluster(images):
    clusters, look = images
    got = routing_semantics(np.repeat(clusters[:, None], 9, 1), clusters, clusters // 2)
    assert got["nmi_cluster"] == pytest.approx(1)
    assert 0.5 < got["nmi_label"] < 1
    assert got["token_agreement"] == 1
    logits = np.eye(4)[np.repeat(clusters, 9)]
    assert pixel_routing(logits, look[:, 0], look[:, 1]) < 0.02


def test_a_router_that_looks_at_brightness(images):
    clusters, look = images
    logits = np.stack([look[:, 0], -look[:, 0]], 1)
    assert pixel_routing(logits, look[:, 0], look[:, 1]) == pytest.approx(1)
    selected = logits.argmax(1).reshape(300, 9)
    got = routing_semantics(selected, clusters, clusters)
    assert got["nmi_cluster"] < 0.05
    assert got["token_agreement"] < 0.8


def test_majority_and_its_ties():
    assert majority_expert(np.array([[0, 1, 1], [2, 2, 0], [0, 1, 2]])).tolist() == [1, 2, 0]


def test_constant_logits_have_nothing_to_explain(images):
    _, look = images
    assert pixel_routing(np.zeros((2700, 3)), look[:, 0], look[:, 1]) == 0
