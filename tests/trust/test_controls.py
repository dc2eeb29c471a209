# SPDX-License-Identifier: Apache-2.0
"""Methods with one fault each: the contract that every method is held to has to see it, or its rows prove nothing."""

import random

import numpy as np
import pytest
import torch

from anabranch.testing import examine
from anabranch.testing.method_contract import FAILED
from tests.testing.test_method_contract import mean, method, of_rows


def drops(features, mask):
    return torch.nan_to_num(features).mean(0)


def ranks_last(features, mask):
    return features.nan_to_num(nan=-1e9, posinf=-1e9).amax(0)


def asks_whether_above(features, mask):
    return (features > 100).any()


def clamps(features, mask):
    return features.nan_to_num(nan=0.0).clamp(-1, 1).mean(0)


def adds_up(features, mask):
    total = features.new_zeros(4)
    for row in features.repeat(200, 1):
        total = total + row.abs()
    return total / 200 + 0 * mean(features, mask)


def cancels(features, mask):
    """A variance as the difference of two large numbers."""
    far = features + 30
    return far.square().mean(0) - far.mean(0).square() + 0 * mean(features, mask)


def drawing(draw):
    return lambda features, mask: mean(features, mask) + 1e-9 * float(draw())


def seeds(features, mask):
    torch.manual_seed(0)
    return mean(features, mask) + torch.rand(4)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


FAULTY = {
    "N6": ({"nan", "inf"}, [drops, ranks_last, asks_whether_above, clamps]),
    "N7": ({"dtype"}, [adds_up, cancels]),
    "N9": ({"rng"}, [*map(drawing, (lambda: torch.rand(()), np.random.rand, random.random)), seeds]),
}
WORDS = {
    "N6": "methods that pass over NaN or infinity are found",
    "N7": "methods that are only right in fp32 are found",
    "N9": "methods that use a global generator are found",
}


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.row(row)) for row in FAULTY])
def test_faulty_methods_are_found(row, counted):
    checks, methods = FAULTY[row]
    found = 0
    for call in methods:
        outcomes = examine(method(), of_rows(call))
        found += all(outcomes[name].state == FAILED for name in checks)  # each has to see it alone
    assert all(examine(method(), of_rows(mean))[name].state != FAILED for name in checks)
    counted(0, control=(found, f"of {len(methods)} {WORDS[row]}"), least=len(methods))


@pytest.mark.row("N1")
def test_a_method_with_a_wrong_gradient_is_found(counted):
    outcomes = examine(method(), of_rows(lambda features, mask: Wrong.apply(mean(features, mask))))
    counted(0, control=(int(outcomes["gradcheck"].state == FAILED), "method with a wrong gradient is found"))
