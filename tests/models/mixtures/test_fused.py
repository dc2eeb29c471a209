# SPDX-License-Identifier: Apache-2.0
import copy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from anabranch.errors import UsageError
from anabranch.models.mixtures import fused, picker
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import mixture_layers

NAMES = sorted(FAMILIES)
SOME = ["GptOss", "Qwen3-MoE"]


@cache
def layer_of(family):
    """Experts of random weights, biases included: a bias of zero would hide that it is forgotten."""
    model = tiny(family)
    experts = mixture_layers(model)[0].experts
    g = torch.Generator().manual_seed(1)
    for value in experts.parameters():
        value.data.copy_(0.3 * torch.randn(value.shape, generator=g))
    return experts


def eager(experts, x, selected, weights):
    return type(experts).forward.__wrapped__(experts, x, selected, weights)


def drawn(tokens, top_k=2, num_experts=8, seed=0, dtype=torch.float32, width=32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    weights, selected = torch.randn(tokens, num_experts, generator=g).softmax(-1).topk(top_k)
    return x, selected, weights.to(dtype), torch.randn(tokens, width, generator=g).to(dtype)


def passed(forward, experts, x, selected, weights, dy):
    """Output and every gradient by name."""
    experts.zero_grad(set_to_none=True)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = forward(experts, x, selected, weights)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "w": weights.grad} | {n: p.grad for n, p in experts.named_parameters()}


def check_same(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            mine[name] / scale, value / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: n + m
        )


def slow(experts, x, selected, weights):
    """The definition, choice by choice, in float64."""
    x, weights = x.double(), weights.double()
    y = torch.zeros_like(x)
    up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    if not experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    for t in range(len(x)):
        for j in range(selected.shape[1]):
            e = int(selected[t, j])
            h = x[t] @ up[e] + (experts.gate_up_proj_bias[e].double() if experts.has_bias else 0)
            out = experts._apply_gate(h[None])[0] @ down[e]
            y[t] += weights[t, j] * (out + (experts.down_proj_bias[e].double() if experts.has_bias else 0))
    return y


@pytest.mark.parametrize("family", NAMES)
def test_agrees_with_eager_in_output_and_all_gradients(family):
    experts = layer_of(family)
    given_ = drawn(200)  # about 50 tokens an expert: blocks are filled up
    check_same(passed(fused.experts_forward, experts, *given_), passed(eager, experts, *given_))


@pytest.mark.parametrize("family", NAMES)
def test_whole_models_say_the_same_and_learn_the_same(family):
    model, ids = tiny(family), torch.arange(1, 25).view(2, 12)

    def run(name):
        model.set_experts_implementation(name)
        model.zero_grad(set_to_none=True)
        out = model(ids, labels=ids)
        out.loss.backward()
        return {"logits": out.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    fused.register()
    check_same(run("anabranch"), run("eager"))


@pytest.mark.parametrize("family", SOME)
def test_equals_the_definition(family):
    experts = layer_of(family)
    x, selected, weights, _ = drawn(40)
    with torch.no_grad():
        made = fused.experts_forward(experts, x, selected, weights)
        torch.testing.assert_close(made.double(), slow(experts, x, selected, weights), atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 8), st.sampled_from(SOME), st.integers(0, 10**6))
def test_any_tokens_choices_and_experts_without_tokens(tokens, top_k, used, family, seed):
    experts = layer_of(family)
    x, _, weights, dy = drawn(tokens, top_k, seed=seed)
    selected = torch.randint(
        used, (tokens, top_k), generator=torch.Generator().manual_seed(seed)
    )  # twice the same, too
    mine = passed(fused.experts_forward, experts, x, selected, weights, dy)
    theirs = passed(eager, experts, x, selected, weights, dy)
    unused = sorted(set(range(8)) - set(selected.flatten().tolist()))
    theirs = {name: torch.zeros_like(mine[name]) if value is None else value for name, value in theirs.items()}
    check_same(mine, theirs)
    assert all(not mine[name][unused].any() for name in fused.WEIGHTS if name in mine)


@pytest.mark.parametrize("family", SOME)
def test_gradcheck_in_float64(family):
    experts = copy.deepcopy(layer_of(family)).double()
    x, selected, weights, _ = drawn(5, dtype=torch.float64)
    stacks = [value.detach().requires_grad_() for value in experts.parameters()]
    names = [name for name, _ in experts.named_parameters()]

    def run(x, weights, *stacks):
        own = SimpleNamespace(**dict(zip(names, stacks, strict=True)), **kinds(experts), named_parameters=lambda: ())
        return fused.experts_forward(own, x, selected, weights)

    # the widths are 32 and 16: random directions instead of every entry
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weights.requires_grad_(), *stacks), fast_mode=True)


def kinds(experts):
    names = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel", "_apply_gate")
    return {name: getattr(experts, name) for name in names}


@pytest.mark.parametrize("family", SOME)
def test_the_same_bits_twice(family):
    experts, given_ = layer_of(family), drawn(300)
    first, second = (passed(fused.experts_forward, experts, *given_) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 700])
def test_all_tokens_to_one_expert(family, tokens, monkeypatch):
    """With 700, in three blocks."""
    monkeypatch.setattr(fused, "BLOCK_BYTES", 1)
    experts = layer_of(family)
    x, _, weights, dy = drawn(tokens, 1)
    given_ = (x, torch.full((tokens, 1), 5), weights, dy)
    check_same(passed(fused.experts_forward, experts, *given_), passed(eager, experts, *given_))


def test_no_tokens():
    experts = layer_of("GptOss")
    made = passed(fused.experts_forward, experts, *drawn(0))
    assert {name: tuple(made[name].shape) for name in "yxw"} == {"y": (0, 32), "x": (0, 32), "w": (0, 2)}
    assert not any(made[name].any() for name in fused.WEIGHTS)


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same():
    given_ = drawn(60)
    for family in SOME:
        whole = passed(fused.experts_forward, layer_of(family), *given_)
        for frozen in whole.keys() - {"y", "x", "w"}:
            experts = copy.deepcopy(layer_of(family))
            getattr(experts, frozen).requires_grad_(False)
            made = passed(fused.experts_forward, experts, *given_)
            assert made.pop(frozen) is None
            assert all(torch.equal(value, whole[name]) for name, value in made.items())
        x, selected, weights, dy = given_
        experts = copy.deepcopy(layer_of(family)).requires_grad_(False)
        weights = weights.clone().requires_grad_()
        fused.experts_forward(experts, x, selected, weights).backward(dy)
        assert torch.equal(weights.grad, whole["w"])


@pytest.mark.parametrize("family", SOME)
def test_bfloat16_is_no_further_from_the_definition_than_eager(family):
    experts = copy.deepcopy(layer_of(family)).bfloat16()
    x, selected, weights, _ = drawn(120, dtype=torch.bfloat16)
    with torch.no_grad():
        told = slow(experts, x, selected, weights)
        mine, theirs = (f(experts, x, selected, weights) for f in (fused.experts_forward, eager))
        assert mine.dtype == torch.bfloat16
        assert (mine - told).norm() <= 1.1 * (theirs - told).norm()
        float_weights = fused.experts_forward(experts, x, selected, weights.float())
        assert float_weights.dtype == torch.bfloat16
        assert (float_weights - told).norm() <= 1.1 * (theirs - told).norm()
    made = passed(fused.experts_forward, experts, *drawn(120, dtype=torch.bfloat16))
    assert all(value.dtype == torch.bfloat16 for value in made.values())


def test_without_onednn_the_numbers_are_the_same(monkeypatch):
    experts, given_ = layer_of("GptOss"), drawn(200)
    fast = passed(fused.experts_forward, experts, *given_)
    monkeypatch.setattr(fused, "has_linear", lambda: False)
    check_same(passed(fused.experts_forward, experts, *given_), fast)


def test_survives_checkpointing_and_refuses_a_second_derivative():
    experts, (x, selected, weights, dy) = layer_of("Qwen3-MoE"), drawn(40)
    plain = passed(fused.experts_forward, experts, x, selected, weights, dy)

    def checkpointed(*given_):
        return torch.utils.checkpoint.checkpoint(fused.experts_forward, *given_, use_reentrant=False)

    check_same(passed(checkpointed, experts, x, selected, weights, dy), plain, tolerance=0)
    x.requires_grad_()
    y = fused.experts_forward(experts, x, selected, weights)
    with pytest.raises(UsageError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_an_expert_that_there_is_not_is_refused():
    experts, (x, selected, weights, _) = layer_of("Qwen3-MoE"), drawn(4)
    with pytest.raises(UsageError, match="expected: 0 to 7\n  received: 8"):
        fused.experts_forward(experts, x, selected.clamp(min=8), weights)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"has_gate": False}, "no gate"),
        ({"has_post_expert_norm": True}, "a norm"),
        ({"_is_expert_parallel": True}, "spread"),
    ],
)
def test_says_why_grouped_mm_runs_instead(changed, why):
    experts = copy.deepcopy(layer_of("Mixtral"))
    x, selected, weights, _ = drawn(8)
    assert fused.why_not(experts, x) is None
    assert "bfloat16" in fused.why_not(experts, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in fused.why_not(experts, x)
        theirs = grouped_mm_experts_forward(experts, x, selected, weights)
        assert torch.equal(fused.experts_forward(experts, x, selected, weights), theirs)
    vars(experts).update(changed)
    assert why in fused.why_not(experts, x)


def test_parameters_of_an_activation_would_get_no_gradient_and_are_left_to_grouped_mm():
    experts = copy.deepcopy(layer_of("Mixtral"))
    experts.act_fn = torch.nn.PReLU()
    assert "act_fn.weight" in fused.why_not(experts, torch.zeros(1, 32))
    passed(fused.experts_forward, experts, *drawn(40))
    assert experts.act_fn.weight.grad.abs() > 0


def test_compile_takes_grouped_mm_whole():
    experts, (x, selected, weights, _) = layer_of("Mixtral"), drawn(50)
    compiled = torch.compile(lambda *a: fused.experts_forward(experts, *a), backend="eager", fullgraph=True)
    with torch.no_grad():
        theirs = eager(experts, x, selected, weights)
        torch.testing.assert_close(compiled(x, selected, weights), theirs, atol=1e-5, rtol=1e-5)


# the picker


@pytest.mark.parametrize("gradient", [False, True])
def test_few_choices_go_to_eager_few_tokens_to_grouped_mm_and_many_to_ours_and_never_back(gradient):
    for top_k, num_experts, size, width in ((8, 64, 512, 64), (2, 8, 512, 1024), (1, 64, 128, 512)):
        chosen = [picker.choose(2**i, top_k, num_experts, size, width, gradient=gradient) for i in range(18)]
        assert chosen == sorted(chosen, key=["eager", "grouped_mm", "anabranch"].index)
        assert {"grouped_mm", "anabranch"} <= set(chosen)
        assert (chosen[0] == "eager") == (top_k == 1 or (top_k == 2 and not gradient))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("tokens", [1, 40, 900])
def test_whatever_is_picked_agrees_with_eager(family, tokens, monkeypatch):
    monkeypatch.setattr(picker, "LEAST_WORK", 0)
    monkeypatch.setattr(picker, "LEAST_WORK_WITH_GRADIENT", 0)
    experts, given_ = layer_of(family), drawn(tokens)
    assert picker.choice(experts, *given_[:3]) == ("anabranch" if tokens == 900 else "grouped_mm")
    check_same(passed(picker.auto_forward, experts, *given_), passed(eager, experts, *given_))
    with torch.no_grad():
        single = tuple(value[:1] for value in given_[:3])
        assert picker.choice(experts, *single) == "eager"
        assert torch.equal(picker.auto_forward(experts, *single), eager(experts, *single))


def test_eager_is_not_picked_under_compile_nor_on_spread_experts():
    experts = copy.deepcopy(layer_of("Mixtral"))
    single = tuple(value[:1] for value in drawn(1)[:3])
    compiled = torch.compile(lambda *a: picker.auto_forward(experts, *a), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*single), eager(experts, *single), atol=1e-5, rtol=1e-5)
        experts._is_expert_parallel = True
        assert picker.choice(experts, *single) == "grouped_mm"


def test_gradients_are_what_a_pass_has_not_what_the_weights_could():
    experts, (x, selected, weights, _) = copy.deepcopy(layer_of("Mixtral")), drawn(10)
    seen = []
    chosen = picker.choose
    try:
        picker.choose = lambda *args, gradient, half: seen.append((args, gradient, half)) or "grouped_mm"
        picker.choice(experts, x, selected, weights)
        with torch.no_grad():
            picker.choice(experts, x, selected, weights)
        picker.choice(experts.requires_grad_(False).bfloat16(), x.bfloat16(), selected, weights)
    finally:
        picker.choose = chosen
    sizes = (10, 2, 8, 32, 16)
    assert seen == [(sizes, True, False), (sizes, False, False), (sizes, False, True)]


@pytest.mark.parametrize("name", ["anabranch_auto", "anabranch"])
def test_fast_experts_are_set_in_every_layer_and_put_back(name):
    model = tiny("Qwen3-MoE")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
        undo = picker.use_fast_experts(model, name)
        assert {layer.experts.config._experts_implementation for layer in mixture_layers(model)} == {name}
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
        undo()
        assert torch.equal(model(ids).logits, before)
    assert model.config._experts_implementation == "grouped_mm"
    assert ALL_EXPERTS_FUNCTIONS[name] is (picker.auto_forward if name.endswith("auto") else fused.experts_forward)


def test_a_dense_model_and_an_unknown_name_are_refused():
    with pytest.raises(UsageError, match="Linear does not let its experts be run otherwise"):
        picker.use_fast_experts(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="expected: anabranch_auto or anabranch\n  received: fast"):
        picker.use_fast_experts(tiny("Mixtral"), "fast")
