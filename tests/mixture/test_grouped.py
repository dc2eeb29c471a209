# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.mixture.grouped import grouped_linear, runs


def slow(rows, sizes, weights, biases):
    out, start = [], 0
    for size, weight, bias in zip(sizes, weights, biases, strict=True):
        out += [weight @ row + bias for row in rows[start : start + size]]
        start += size
    return torch.stack(out)


def problem(sizes, *, packed, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(len(sizes), 4, 3, generator=generator, dtype=dtype)
    weights = [w if packed else w.clone() for w in stack]
    weights = [w.requires_grad_() for w in weights]
    biases = [torch.randn(4, generator=generator, dtype=dtype).requires_grad_() for _ in sizes]
    return torch.randn(sum(sizes), 3, generator=generator, dtype=dtype).requires_grad_(), weights, biases


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_the_loop(sizes, packed, seed):
    x, weights, biases = problem(sizes, packed=packed, seed=seed)
    fast, loop = grouped_linear(x, sizes, weights, biases), slow(x, sizes, weights, biases)
    assert torch.allclose(fast, loop)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [x, *weights, *biases]) for y in (fast, loop)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 3]])
def test_gradcheck(sizes, packed):
    x, weights, biases = problem(sizes, packed=packed)
    assert torch.autograd.gradcheck(lambda x, *wb: grouped_linear(x, sizes, wb[:3], wb[3:]), (x, *weights, *biases))


def test_equal_neighbours_form_one_run():
    _, weights, _ = problem([2] * 5, packed=True)
    assert runs([2, 2, 2, 2, 2], weights) == [(slice(0, 5), 0, 10)]
    assert runs([2, 2, 3, 2, 2], weights) == [(slice(0, 2), 0, 4), (slice(2, 3), 4, 7), (slice(3, 5), 7, 11)]
    assert runs([2, 2], [weights[0], weights[2]]) == [(slice(0, 1), 0, 2), (slice(1, 2), 2, 4)]
    assert len(runs([2, 2], [w.clone() for w in weights[:2]])) == 2


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weights, biases = problem([2, 2], packed=True)
    x.requires_grad_(False)
    weights[0].requires_grad_(False)
    grouped_linear(x, [2, 2], weights, biases).sum().backward()
    assert x.grad is None
    assert weights[0].grad is None
    assert weights[1].grad is not None


def test_an_expanded_gradient_is_taken():
    x, weights, biases = problem([2, 2], packed=True)
    grouped_linear(x, [2, 2], weights, biases).sum().backward()
    assert torch.allclose(biases[0].grad, torch.full((4,), 2.0, dtype=torch.float64))
