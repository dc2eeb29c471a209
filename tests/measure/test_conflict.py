# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from anabranch.measure.conflict import gradient_conflict


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 1)


def test_opposite_aims_conflict_and_equal_aims_agree(model, generator):
    x = torch.randn(2, 64, 6, generator=generator)
    up = lambda half: -model(x[half]).mean()  # noqa: E731
    down = lambda half: model(x[half]).mean()  # noqa: E731
    before = {name: p.clone() for name, p in model.named_parameters()}
    cosine = gradient_conflict(model, [up, down, up])
    assert cosine[0, 1].item() == pytest.approx(-1, abs=1e-5)
    assert cosine[0, 2].item() == pytest.approx(1, abs=1e-5)
    assert cosine[0, 0] < 0.999  # the ceiling: two batches of one source differ
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_one_source_does_not_reach_counts_as_zero(model):
    cosine = gradient_conflict(model, [lambda _: model.weight[0, 0], lambda _: model.bias[0]])
    assert cosine[0, 1].item() == pytest.approx(0)
