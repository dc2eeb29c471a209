# SPDX-License-Identifier: Apache-2.0
"""LoRA experts on PEFT's layers against a loop over tokens, against PEFT itself, and in their limits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from anabranch.errors import UsageError
from anabranch.mixture import Context, route
from anabranch.mixture.lora import EVERYBODY, NOBODY, Plan, lora_layers, route_lora, unroute_lora

EXPERTS = ("analysis", "guidance", "answer")
FAMILIES = ("llama", "gpt2")


def base(family="llama"):
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
            attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def adapted(family="llama", names=(*EXPERTS, "shared"), moved=True, **config):
    """A PEFT model with adapters of these names, their B moved away from zero."""
    settings_of = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "fan_in_fan_out": family == "gpt2",
        **config,
    }
    model = get_peft_model(base(family), LoraConfig(**settings_of), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**settings_of))
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model, tokens, ids):
    with route(model, Context(ids={"step": ids})):
        return model(tokens).logits


TOKENS = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(-2, 3, (3, 12), generator=torch.Generator().manual_seed(3))
SOLO = IDS.clamp(min=NOBODY)
"""No token asks for all experts at once, which "gathered" leaves to "segment"."""


def slow_layer(layer, x, ids, plan):
    """Token by token, from the definition."""
    y = layer.base_layer(x)
    share = 1.0 if plan.universal is None else plan.alpha

    def expert(name, token):
        return layer.lora_B[name](layer.lora_A[name](token)) * layer.scaling[name]

    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            i = int(ids[b, t])
            if i == EVERYBODY:
                y[b, t] += sum(share / len(plan.experts) * expert(name, x[b, t]) for name in plan.experts)
            elif i != NOBODY:
                y[b, t] += share * expert(plan.experts[i], x[b, t])
            if plan.universal is not None:
                y[b, t] += (1 - share) * expert(plan.universal, x[b, t])
    return y


@pytest.mark.parametrize("universal", ["shared", None])
@pytest.mark.parametrize("path", ["dense", "segment", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [IDS, SOLO], ids=["all", "solo"])
def test_every_path_is_the_loop_over_tokens(family, path, universal, ids):
    model = adapted(family)
    plan = Plan(experts=EXPERTS, universal=universal, alpha=0.3, path=path)
    names = route_lora(model, plan)
    assert len(names) == {"llama": 14, "gpt2": 8}[family]
    layer = lora_layers(model)[names[-1]]
    x = torch.randn(3, 12, layer.in_features, generator=torch.Generator().manual_seed(4))
    with route(model, Context(ids={"step": ids})), torch.no_grad():
        torch.testing.assert_close(layer(x), slow_layer(layer, x, ids, plan), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([EVERYBODY, NOBODY, 0]))
def test_paths_agree_in_values_and_gradients(seed, alpha, lowest):
    ids = torch.randint(lowest, 3, (3, 12), generator=torch.Generator().manual_seed(seed))
    found = []
    for path in ("dense", "segment", "gathered"):
        model = adapted()
        route_lora(model, Plan(experts=EXPERTS, universal="shared", alpha=alpha, path=path))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        out = logits(model, TOKENS, ids)
        out.square().mean().backward()
        grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
        found.append((out.detach(), {name: grad for name, grad in grads.items() if "lora" in name}))
    for out, grads in found[1:]:
        torch.testing.assert_close(out, found[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grads, found[0][1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_expert_leaves_the_model_as_it_is(family):
    model = adapted(family, moved=False)
    route_lora(model, Plan(experts=EXPERTS, universal="shared", alpha=0.3))
    assert torch.equal(logits(model, TOKENS, IDS), base(family)(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_it_is_what_peft_makes_of_that_adapter(family):
    """alpha 1 is the expert, alpha 0 the universal one."""
    model = adapted(family)
    alone = {}
    for name in ("guidance", "shared"):
        model.set_adapter(name)
        alone[name] = model(TOKENS).logits
    route_lora(model, Plan(experts=EXPERTS, universal="shared", alpha=1.0))
    torch.testing.assert_close(logits(model, TOKENS, torch.ones(3, 12).long()), alone["guidance"], atol=1e-5, rtol=1e-5)
    route_lora(model, Plan(experts=EXPERTS, universal="shared", alpha=0.0))
    torch.testing.assert_close(logits(model, TOKENS, IDS), alone["shared"], atol=1e-5, rtol=1e-5)
    unroute_lora(model)
    assert torch.equal(model(TOKENS).logits, alone["shared"])
    assert not any(type(module).__name__.startswith("Routed") for module in model.modules())


@settings(deadline=None, max_examples=10)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_four_equal_experts_are_one_adapter_whatever_the_ids(alpha, seed):
    model = adapted()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for part in (layer.lora_A, layer.lora_B):
                for name in EXPERTS:
                    part[name].weight.copy_(part["shared"].weight)
    model.set_adapter("shared")
    single = model(TOKENS).logits
    route_lora(model, Plan(experts=EXPERTS, universal="shared", alpha=alpha))
    ids = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(logits(model, TOKENS, ids), single, atol=1e-5, rtol=1e-5)


def test_ids_of_samples_are_ids_of_all_their_tokens():
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    ids = torch.tensor([2, 0, 1])
    assert torch.equal(logits(model, TOKENS, ids), logits(model, TOKENS, ids[:, None].expand(3, 12)))


def test_what_is_kept_between_passes_is_made_anew_after_a_step():
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    with torch.no_grad():
        before = logits(model, TOKENS, IDS)
        assert torch.equal(logits(model, TOKENS, IDS), before)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        assert not torch.allclose(logits(model, TOKENS, IDS), before)
    assert torch.allclose(logits(copy.deepcopy(model), TOKENS, IDS), logits(model, TOKENS, IDS))


def test_what_one_context_keeps_is_used_in_all_its_passes_and_not_where_something_learns():
    """A generation is one context: A and B are stacked once, and with gradients in every pass."""
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    parts = [p for name, p in model.named_parameters() if "lora_B" in name]
    with route(model, Context(ids={"step": IDS})):
        with torch.no_grad():
            before = model(TOKENS).logits
            for part in parts:
                part.mul_(2)
            assert torch.equal(model(TOKENS).logits, before)
        learned = model(TOKENS).logits
    assert torch.allclose(learned, logits(model, TOKENS, IDS), atol=1e-6)
    assert not torch.allclose(learned, before)


@pytest.mark.parametrize("path", ["dense", "segment", "gathered"])
@pytest.mark.parametrize("strange", [3, -3])
def test_an_id_that_no_expert_has_is_refused_on_every_path(path, strange):
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared", path=path))
    ids = IDS.clone()
    ids[1, 4] = strange
    with pytest.raises(UsageError, match=rf"(?s)no expert for a step id.*received: {strange}"):
        logits(model, TOKENS, ids)


def test_rows_without_a_sequence_are_refused():
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    layer = next(iter(lora_layers(model).values()))
    with route(model, Context(ids={"step": IDS})), pytest.raises(UsageError, match=r"in \(B, N, I\)"):
        layer(torch.randn(36, layer.in_features))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointed in (False, True):
        model = adapted()
        route_lora(model, Plan(experts=EXPERTS, universal="shared"))
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        if checkpointed:
            inner = model.get_base_model()
            newer = getattr(inner, "activation_checkpointing_enable", None)
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = logits(model, TOKENS, IDS).square().mean()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() <= found[1].keys()
    torch.testing.assert_close({name: found[1][name] for name in found[0]}, found[0])


def test_a_disabled_adapter_is_the_base():
    model = adapted()
    plain = base()(TOKENS).logits
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda m: logits(m, TOKENS, torch.full((3, 12), 3)), "no expert for a step id"),
        (lambda m: logits(m, TOKENS, torch.full((3, 12), -3)), "no expert for a step id"),
        (lambda m: logits(m, TOKENS, IDS[:, :5]), "does not fit the batch"),
        (lambda m: m(TOKENS), "ran without a context"),
        (lambda m: (m.merge_adapter(["shared"]), logits(m, TOKENS, IDS)), "merged into the weights"),
        (lambda m: route_lora(m, Plan(experts=("analyse",), universal=None)), "no adapter 'analyse'"),
        (lambda m: route_lora(base(), Plan(experts=EXPERTS, universal=None)), "no LoRA layer"),
        (lambda m: Plan(experts=EXPERTS, universal="shared", alpha=1.5), "alpha is a share"),
        (lambda m: Plan(experts=EXPERTS, universal="answer"), "named once each"),
    ],
)  # fmt: skip
def test_what_cannot_be_routed_says_why(break_it, says):
    model = adapted()
    route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    with pytest.raises(UsageError, match=says):
        break_it(model)


def test_dora_and_ranks_that_differ_are_refused():
    model = adapted(names=EXPERTS)
    model.add_adapter("shared", LoraConfig(r=5, lora_alpha=6, target_modules="all-linear"))
    with pytest.raises(UsageError, match="differ in rank"):
        route_lora(model, Plan(experts=EXPERTS, universal="shared"))
    with pytest.raises(UsageError, match="more than a plain LoRA"):
        route_lora(adapted(use_dora=True), Plan(experts=EXPERTS, universal="shared"))
