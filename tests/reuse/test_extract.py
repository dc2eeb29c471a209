# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from anabranch.mixture.context import Context, route
from anabranch.mixture.experts import ExpertBank
from anabranch.mixture.layer import Mixture
from anabranch.mixture.routing import Router, TableScore, prob, straight_through
from anabranch.reuse.extract import expert_of, extract


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


def mixture(weigh, universal=None):
    g = torch.Generator().manual_seed(0)
    bank = ExpertBank.from_template(Block(), 3, noise=0.5, generator=g)
    score = TableScore(torch.randn(5, 4, generator=g), 3, generator=g)
    return nn.Sequential(Mixture(Router(score, weigh=weigh), bank, universal=universal))


@pytest.mark.parametrize("weigh", [straight_through, prob])
def test_extraction_equals_routing_for_every_cluster(weigh, generator):
    model = mixture(weigh).eval()
    x = torch.randn(2, 7, 6, generator=generator)
    for cluster in range(5):
        with torch.no_grad(), route(model, Context(ids={"cluster": torch.tensor([cluster] * 2)})):
            routed = model(x)
        with torch.no_grad():
            dense = extract(model, cluster)(x)
        assert torch.allclose(dense, routed, atol=1e-6)


def test_what_was_extracted_owns_its_memory():
    model = mixture(straight_through)
    dense = extract(model, 0)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert type(dense[0]) is Block


def test_a_universal_expert_does_not_fold():
    with pytest.raises(ValueError, match="twice the width"):
        expert_of(mixture(prob, universal=Block())[0], 0)
