# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.mixture import Routing, balance_loss, entropy, hard_load_importance, importance_loss, router_z_loss


def routing(logits, top_k=1, *, samples=1, mask=None, per="token"):
    scores = logits.softmax(1)
    weights, selected = scores.topk(top_k)
    return Routing(logits, scores, selected, weights, per, samples, mask)


def peaked(experts, num_experts):
    """All but certain choices."""
    return 50 * torch.nn.functional.one_hot(torch.tensor(experts), num_experts).float()


def slow_cv_squared(loads):
    mean = sum(loads) / len(loads)
    return sum((load - mean) ** 2 for load in loads) / len(loads) / (mean**2 + 1e-10)


def slow_balance_loss(probs, selected, mask):
    rows, num_experts = [t for t in range(len(probs)) if mask[t]], len(probs[0])
    choices, total = [int(e) for t in rows for e in selected[t]], 0.0
    for e in range(num_experts):
        total += choices.count(e) / len(choices) * sum(float(probs[t][e]) for t in rows) / len(rows)
    return num_experts * total


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_importance_is_zero_for_uniform_loads_and_experts_minus_one_for_one(num_experts):
    uniform = routing(peaked(list(range(num_experts)) * 3, num_experts))
    collapsed = routing(peaked([1] * 6, num_experts))
    for loss in (importance_loss, hard_load_importance):
        assert loss(uniform).item() == pytest.approx(0, abs=1e-6)
        assert loss(collapsed).item() == pytest.approx(num_experts - 1, rel=1e-5)


def test_only_the_hard_load_sees_top_1_collapse_behind_flat_probabilities():
    flat = routing(torch.tensor([[0.01, 0.0, 0.0, 0.0]]).repeat(8, 1))
    assert importance_loss(flat).item() < 1e-3
    assert hard_load_importance(flat).item() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_experts", [4, 8])
def test_balance_is_one_for_uniform_routing_and_experts_over_k_for_collapse(num_experts, top_k):
    rows = 2 * num_experts
    uniform = torch.full((rows, num_experts), 1 / num_experts)
    spread = torch.stack([(torch.arange(rows) * top_k + j) % num_experts for j in range(top_k)], 1)
    balanced = Routing(uniform.log(), uniform, spread, uniform[:, :top_k], "token", 2)
    same = torch.arange(top_k).expand(rows, top_k)
    scores = torch.zeros(rows, num_experts)
    scores[:, :top_k] = 1 / top_k
    collapsed = Routing(scores.log(), scores, same, scores[:, :top_k], "token", 2)
    for scope in ("batch", "sequence", "global"):
        assert balance_loss(balanced, scope).item() == pytest.approx(1)
        assert balance_loss(collapsed, scope).item() == pytest.approx(num_experts / top_k)


@settings(deadline=None, max_examples=200)
@given(
    samples=st.integers(1, 4),
    length=st.integers(1, 5),
    num_experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_losses_equal_the_loops_over_real_tokens(samples, length, num_experts, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples * length, num_experts, generator=generator)
    mask = torch.rand(samples, length, generator=generator) < 0.7
    mask[:, 0] = True
    decided = routing(logits, top_k, samples=samples, mask=mask.flatten())
    probs, real = decided.scores.tolist(), mask.flatten().nonzero()[:, 0].tolist()
    loads = [sum(probs[t][e] for t in real) for e in range(num_experts)]
    counts = [sum(int(e in decided.selected_experts[t]) for t in real) for e in range(num_experts)]
    per_sample = [
        slow_balance_loss(
            probs[i : i + length], decided.selected_experts[i : i + length], mask.flatten()[i : i + length]
        )
        for i in range(0, samples * length, length)
    ]
    entropies = [-sum(p * math.log(p) for p in probs[t]) for t in real]
    squares = [math.log(sum(math.exp(l) for l in logits[t].tolist())) ** 2 for t in real]
    close = {"rel": 1e-4, "abs": 1e-5}
    assert importance_loss(decided).item() == pytest.approx(slow_cv_squared(loads), **close)
    assert hard_load_importance(decided).item() == pytest.approx(slow_cv_squared(counts), **close)
    whole = slow_balance_loss(probs, decided.selected_experts, mask.flatten())
    assert balance_loss(decided).item() == pytest.approx(whole, **close)
    assert balance_loss(decided, "sequence").item() == pytest.approx(sum(per_sample) / samples, **close)
    assert entropy(decided).item() == pytest.approx(sum(entropies) / len(real), **close)
    assert router_z_loss(decided).item() == pytest.approx(sum(squares) / len(real), **close)


@pytest.mark.parametrize("loss", [importance_loss, hard_load_importance, balance_loss])
def test_the_gradient_pushes_the_overloaded_expert_down(loss):
    logits = torch.tensor([[0.5, 0.0, -0.5]] * 6, requires_grad=True)
    loss(routing(logits)).backward()
    push = logits.grad.sum(0)
    assert push[0] > 0
    assert push[2] < 0


@pytest.mark.parametrize("loss", [importance_loss, balance_loss, router_z_loss, entropy])
def test_gradcheck(loss):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: loss(routing(logits)), logits)


def test_the_hard_load_has_the_gradient_of_the_soft_one_at_its_own_value():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    decided = routing(logits)
    counts = decided.choices().sum(0).requires_grad_()
    (at_counts,) = torch.autograd.grad(slow_cv_squared(list(counts)), counts)
    (expected,) = torch.autograd.grad((decided.scores.sum(0) * at_counts).sum(), logits, retain_graph=True)
    (received,) = torch.autograd.grad(hard_load_importance(decided), logits)
    assert torch.allclose(received, expected)


def test_z_loss_and_entropy_of_zeros():
    zeros = routing(torch.zeros(3, 8))
    assert router_z_loss(zeros).item() == pytest.approx(math.log(8) ** 2)
    assert entropy(zeros).item() == pytest.approx(math.log(8))
    shifted = routing(torch.full((3, 8), 2.0))
    assert router_z_loss(shifted).item() == pytest.approx((math.log(8) + 2) ** 2)


def test_impossible_experts_give_finite_losses_and_gradients():
    logits = torch.zeros(4, 3)
    logits[:, 2] = -math.inf
    logits.requires_grad_()
    decided = routing(logits)
    total = sum(loss(decided) for loss in (importance_loss, hard_load_importance, balance_loss, entropy))
    total.backward()
    assert total.isfinite()
    assert logits.grad[:, :2].isfinite().all()


def test_samples_have_no_sequences():
    with pytest.raises(UsageError, match="scope sequence needs a router of tokens"):
        balance_loss(routing(torch.zeros(3, 2), per="sample", samples=3), "sequence")
