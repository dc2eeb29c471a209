# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.merge.low_rank import compress_experts, low_rank_plus_rows


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), rank=st.integers(0, 5), num_rows=st.integers(0, 7))
def test_what_is_missed_is_the_tail_without_its_heaviest_rows(seed, rank, num_rows):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).double()
    factors = low_rank_plus_rows(weight, rank, num_rows)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    tail = (u[:, rank:] * s[rank:]) @ v[rank:]
    left_over = sorted((row.norm() ** 2 for row in tail), reverse=True)[num_rows:]
    assert float((weight - factors.matrix()).square().sum()) == pytest.approx(float(sum(left_over)), abs=1e-9)
    assert factors.num_stored() == 12 * rank + 6 * num_rows


def test_a_planted_product_and_row_are_found_exactly():
    g = torch.Generator().manual_seed(0)
    weight = 0.01 * torch.randn(8, 2, generator=g).double() @ torch.randn(2, 6, generator=g).double()
    weight[3] += 5 * torch.randn(6, generator=g).double()
    factors = low_rank_plus_rows(weight, rank=3, num_rows=0)  # the row adds one to the rank
    assert float((factors.matrix() - weight).abs().max()) < 1e-12
    assert float((low_rank_plus_rows(weight, 2, 0).matrix() - weight).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_carry_the_product_of_their_factors(family):
    layer = mixture_layers(tiny(family))[0]
    bank = ExpertBank(layer)
    other = bank[0].gate.clone()
    factors = compress_experts(layer, [2, 5], rank=4, num_rows=3)
    for name in ("gate", "up", "down"):
        matrix = factors[name].matrix().float()
        assert torch.equal(getattr(bank[2], name), matrix)
        assert torch.equal(getattr(bank[5], name), matrix)
    assert torch.equal(bank[0].gate, other)


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(UsageError, match="rank 0 to 5, 0 to 7 rows"):
        low_rank_plus_rows(torch.zeros(7, 5), 6)
