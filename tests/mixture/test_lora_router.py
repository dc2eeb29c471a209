# SPDX-License-Identifier: Apache-2.0
"""Routers that learn over LoRA experts: the definition as a loop, clusters treated alike, gradients that arrive."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.mixture import Context, route
from anabranch.mixture.lora import lora_layers
from anabranch.mixture.lora_router import GatedLora, balance_of, learn_routes
from anabranch.mixture.routing import LinearScore, Router, TableScore, TopK, prob, renormalised
from tests.mixture.test_lora import EXPERTS, TOKENS, adapted

NAMES = (*EXPERTS, "shared")
CENTROIDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))


def by_token(width):
    generator = torch.Generator().manual_seed(width)
    return Router(LinearScore(width, len(NAMES), generator=generator), select=TopK(2), weigh=renormalised)


def by_cluster(width):
    generator = torch.Generator().manual_seed(width)
    return Router(TableScore(CENTROIDS, len(EXPERTS), generator=generator), weigh=prob)


def slow(layer, x, row_ids=None):
    """Row by row, token by token, expert by expert, from the equation."""
    y = layer.base_layer(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            score = layer.router.score
            logits = score.gate(x[b, n]) if row_ids is None else score.gate(CENTROIDS[row_ids[b]])
            chosen = logits.topk(2 if row_ids is None else 1).indices
            p = logits.softmax(-1)[chosen]
            shares = dict(zip((NAMES[i] for i in chosen), p / p.sum() if row_ids is None else p, strict=True))
            if row_ids is not None:
                shares["shared"] = 1 - p[0]
            for name, share in shares.items():
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                y[b, n] += share * layer.scaling[name] * (B @ (A @ x[b, n]))
    return y


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gate_of_tokens_is_the_loop_over_tokens_and_experts(family):
    model = adapted(family)
    learn_routes(model, NAMES, None, by_token)
    for layer in list(lora_layers(model).values())[:3]:
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), slow(layer, x), atol=1e-5, rtol=1e-5)


def test_a_gate_of_clusters_treats_all_tokens_of_its_rows_alike_and_hands_the_rest_to_the_universal_expert():
    model, ids = adapted(), torch.tensor([4, 0])
    learn_routes(model, EXPERTS, "shared", by_cluster)
    with torch.no_grad(), route(model, Context(ids={"cluster": ids})):
        for layer in list(lora_layers(model).values())[:3]:
            x = torch.randn(2, 5, layer.in_features)
            torch.testing.assert_close(layer(x), slow(layer, x, ids.tolist()), atol=1e-5, rtol=1e-5)


def test_routers_learn_and_the_balance_of_an_even_load_is_one():
    model = adapted()
    learn_routes(model, NAMES, None, by_token)
    (model(TOKENS).logits.square().mean() + balance_of(model)).backward()
    gates = [layer.router.score.gate.weight for layer in model.modules() if isinstance(layer, GatedLora)]
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
    for layer in model.modules():
        if isinstance(layer, GatedLora):
            torch.nn.init.zeros_(layer.router.score.gate.weight)  # every p is 1 / E, whoever is chosen
    model(TOKENS)
    assert float(balance_of(model).detach()) == pytest.approx(1.0)


def test_fresh_experts_leave_the_model_as_it_is():
    model = adapted(moved=False)
    with model.disable_adapter():
        before = model(TOKENS).logits
    learn_routes(model, NAMES, None, by_token)
    assert torch.equal(model(TOKENS).logits, before)


def test_a_disabled_adapter_is_the_base_and_a_merged_one_is_refused():
    model = adapted()
    with model.disable_adapter():
        plain = model(TOKENS).logits
    learn_routes(model, NAMES, None, by_token)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, plain)
    model.merge_adapter(["shared"])
    with pytest.raises(UsageError, match="merged into the weights"):
        model(TOKENS)


def test_the_balance_is_of_the_last_forward_and_asked_for_once():
    model = adapted()
    learn_routes(model, NAMES, None, by_token)
    with pytest.raises(UsageError, match="nothing was routed yet"):
        balance_of(model)
    model(TOKENS[:1])
    balance_of(model)
    model(TOKENS)
    second = balance_of(model)
    model(TOKENS)
    assert torch.equal(balance_of(model), second)
    with pytest.raises(UsageError, match="nothing was routed yet"):
        balance_of(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_is_run_again_is_routed_again_and_counted_once(reentrant):
    found = []
    for checkpointed in (False, True):
        model = adapted()
        learn_routes(model, NAMES, None, by_token)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "gate" in name)
        model.train()
        if checkpointed:
            inner = model.get_base_model()
            newer = getattr(inner, "activation_checkpointing_enable", None)
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(TOKENS).logits.square().mean().backward()
        found.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, balance_of(model)))
    (plain, balance), (again, balance_again) = found
    torch.testing.assert_close({name: again[name] for name in plain}, plain)
    assert torch.equal(balance.detach(), balance_again.detach())


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(UsageError, match="has no adapter 'other'"):
        learn_routes(adapted(), ("other",), None, by_token)
    with pytest.raises(UsageError, match="no LoRA layer"):
        learn_routes(torch.nn.Linear(2, 2), NAMES, None, by_token)
    model = adapted()
    learn_routes(model, EXPERTS, "shared", by_cluster)
    with pytest.raises(UsageError, match="cluster"):
        model(TOKENS)
