# SPDX-License-Identifier: Apache-2.0
"""Small layers to test with: width 6, hidden 10, 4 experts, 5 clusters."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anabranch.mixture import (
    ExpertBank,
    FixedTable,
    GateNoise,
    LinearScore,
    Mixture,
    Router,
    TableScore,
    TopK,
    renormalised,
    straight_through,
)

WIDTH, HIDDEN, EXPERTS, CLUSTERS = 6, 10, 4, 5


class FeedForward(nn.Module):
    """As transformers lays it out."""

    def __init__(self, generator):
        super().__init__()
        self.activation_fn = nn.GELU()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def feed_forward(seed=0):
    return FeedForward(seeded(seed))


def bank(num_experts=EXPERTS, seed=0):
    """Experts that differ a lot."""
    return ExpertBank.from_template(feed_forward(seed), num_experts, noise=1.0, generator=seeded(seed))


def centroids(num_clusters=CLUSTERS, seed=0):
    return torch.randn(num_clusters, 7, generator=seeded(seed))


def cluster_router(num_experts=EXPERTS, *, weigh=straight_through, seed=0, **options):
    score = TableScore(centroids(seed=seed), num_experts, generator=seeded(seed))
    return Router(score, adjust=[GateNoise()], weigh=weigh, **options)


def token_router(num_experts=EXPERTS, top_k=2, *, weigh=renormalised, seed=0):
    score = LinearScore(WIDTH, num_experts, generator=seeded(seed))
    return Router(score, adjust=[GateNoise()], select=TopK(top_k), weigh=weigh)


def fixed_router(num_experts=EXPERTS):
    return Router(FixedTable(torch.arange(CLUSTERS) % num_experts, num_experts))


def layer(router=None, **options):
    router = router or cluster_router(**options)
    return Mixture(router, bank(router.num_experts))


@pytest.fixture
def small():
    return SimpleNamespace(
        width=WIDTH,
        experts=EXPERTS,
        clusters=CLUSTERS,
        feed_forward=feed_forward,
        bank=bank,
        centroids=centroids,
        cluster_router=cluster_router,
        token_router=token_router,
        fixed_router=fixed_router,
        layer=layer,
        seeded=seeded,
    )
