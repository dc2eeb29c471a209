# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.measure.rank import directions


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31 - 1), st.floats(0.01, 100), st.floats(-10, 10))
def test_copies_add_no_direction_and_scale_changes_nothing(count, seed, scale, shift):
    rows = torch.randn(40 * count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthogonal = torch.linalg.qr(rows - rows.mean(0)).Q
    assert directions(orthogonal) == -(-95 * count // 100)  # equal variances: 95 % of them
    copies = torch.cat([orthogonal, -3 * orthogonal], 1) * scale + shift
    assert directions(copies) == directions(orthogonal)


def test_collapsed_features_have_one_direction_and_constant_ones_none():
    line = torch.linspace(0, 1, 50)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert directions(line) == 1
    assert directions(torch.ones(50, 3)) == 0


def test_one_dimension_is_one_direction():
    assert directions(torch.arange(5.0)[:, None]) == pytest.approx(1)
