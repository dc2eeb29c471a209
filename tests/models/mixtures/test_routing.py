# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import Triple, open_layers
from anabranch.models.mixtures.routing import (
    biased,
    changed,
    forced,
    off_empty,
    off_refill,
    refuse_unseen,
    scaled,
    watched,
)

IDS = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(4))
GROUPED = {"DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def mark(*experts, num_experts=8):
    marked = torch.zeros(num_experts, dtype=torch.bool)
    marked[list(experts)] = True
    return marked


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request):
    model = tiny(request.param)
    return request.param, model, open_layers(model)


# watching


def test_what_is_watched_is_what_the_router_returns(opened):
    _, model, layers = opened
    returned, seen = [], []
    hooks = [layer.router.register_forward_hook(lambda m, i, o: returned.append(o)) for layer in layers]
    plain = logits(model)
    for hook in hooks:
        hook.remove()
    with watched(layers, seen.append):
        assert torch.equal(logits(model), plain)
    assert [one.layer.name for one in seen] == [layer.name for layer in layers]
    for one, triple in zip(seen, returned, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.triple, triple, strict=True))
        assert one.triple.selected_experts.shape == (20, 2)


def test_unweighted_outputs_recombine_to_the_blocks(opened):
    _, model, layers = opened
    seen, blocks, shared = [], {}, {}
    hooks = []
    for layer in layers:
        keep = lambda m, i, o, name=layer.name: blocks.__setitem__(name, o[0] if isinstance(o, tuple) else o)  # noqa: E731
        hooks.append(layer.block.register_forward_hook(keep))
        if layer.shared_name:
            part = layer.block.get_submodule(layer.shared_name)
            keep = lambda m, i, o, name=layer.name: shared.__setitem__(name, o)  # noqa: E731
            hooks.append(part.register_forward_hook(keep))
    with watched(layers, seen.append, outputs=True):
        logits(model)
    for hook in hooks:
        hook.remove()
    for one in seen:
        block_TD = blocks[one.layer.name].reshape(-1, 32)
        rest_TD = torch.zeros_like(block_TD)
        if one.layer.name in shared:
            rest_TD = shared[one.layer.name].reshape(-1, 32)
            gate = one.layer.block._modules.get("shared_expert_gate")
            if gate is not None:
                with torch.no_grad():
                    rest_TD = torch.sigmoid(gate(one.hidden_states)) * rest_TD
        bank = ExpertBank(one.layer)
        for t in (0, 7, 19):
            total = rest_TD[t].clone()
            for k in range(2):
                e = int(one.triple.selected_experts[t, k])
                alone = bank.run(e, one.hidden_states[t : t + 1])[0]
                assert torch.allclose(one.outputs[t, k], alone, atol=1e-5)
                total += one.triple.routing_weights[t, k] * one.outputs[t, k]
            assert torch.allclose(total, block_TD[t], atol=1e-5)


def test_the_stream_is_what_the_block_is_added_to(opened):
    """Stream + what the layer adds = what the layer hands on."""
    family, model, layers = opened
    seen, handed_on, added = {}, {}, {}
    hooks = []
    for layer in layers:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        keep = lambda m, i, o, name=layer.name: handed_on.__setitem__(name, o[0] if isinstance(o, tuple) else o)  # noqa: E731
        hooks.append(parent.register_forward_hook(keep))
        last = parent.post_feedforward_layernorm if family == "FlexOlmo" else layer.block
        keep = lambda m, i, o, name=layer.name: added.__setitem__(name, o[0] if isinstance(o, tuple) else o)  # noqa: E731
        hooks.append(last.register_forward_hook(keep))
    with watched(layers, lambda one: seen.__setitem__(one.layer.name, one), residual=True, model=model):
        logits(model)
    for hook in hooks:
        hook.remove()
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for name, one in seen.items():
        expected = handed_on[name].reshape(-1, 32)
        assert torch.allclose(one.residual + scale * added[name].reshape(-1, 32), expected, atol=1e-5)


def test_watches_nest_and_leave_no_trace():
    model = tiny("Mixtral")
    layers, outer, inner = open_layers(model), [], []
    plain = logits(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with watched(layers, outer.append, outputs=True):
        with watched(layers, inner.append, outputs=True):
            logits(model)
        logits(model)
    assert len(outer) == 6
    assert len(inner) == 3
    assert all(one.outputs is not None for one in (*outer[3:], *inner))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: set(values) for name, values in before.items()} == {name: set(v) for name, v in after.items()}
    assert all(not values["_forward_hooks"] and not values["_forward_pre_hooks"] for values in after.values())
    assert torch.equal(logits(model), plain)


def test_somebody_elses_forward_of_the_instance_is_put_back():
    """accelerate hangs its own forward on modules that it spreads over devices."""
    model = tiny("Mixtral")
    layers, called = open_layers(model), []
    experts = layers[0].experts
    former = experts.forward
    experts.forward = lambda *arguments: called.append(1) or former(*arguments)
    with watched(layers, lambda one: None, outputs=True):
        logits(model)
    logits(model)
    assert called == [1]


def test_an_error_inside_leaves_no_trace():
    model = tiny("Mixtral")
    layers, plain = open_layers(model), logits(model)
    with pytest.raises(ZeroDivisionError), watched(layers, lambda one: 1 / 0, outputs=True):
        logits(model)
    with pytest.raises(ZeroDivisionError), changed(layers, lambda layer, triple: 1 / 0):
        logits(model)
    assert torch.equal(logits(model), plain)
    assert not any(layer.router._forward_hooks or "forward" in vars(layer.experts) for layer in layers)


def test_a_hook_that_never_fired_is_an_error():
    model = tiny("Mixtral")
    layers = open_layers(model)
    message = (
        "2 of 3 mixture layers never ran\n  expected: a forward pass inside the `with`\n"
        "  received: the first that did not run is model.layers.1.mlp"
    )
    with pytest.raises(AnabranchError, match=message):
        refuse_unseen(layers, {layers[0].name})
    with pytest.raises(AnabranchError, match="3 of 3 mixture layers never ran"), watched(layers, print):
        pass
    with pytest.raises(AnabranchError, match="3 of 3 mixture layers never ran"), changed(layers, lambda _, t: t):
        logits(tiny("Mixtral"))  # another model


# changing


def test_off_empty_is_a_down_projection_of_zero(opened):
    _, model, layers = opened
    plain = logits(model)
    emptied = copy.deepcopy(model)
    for layer in open_layers(emptied):
        expert = ExpertBank(layer)[5]
        expert.down.zero_()
        if expert.down_bias is not None:
            expert.down_bias.zero_()
    with changed(layers, lambda layer, triple: off_empty(triple, mark(5))):
        without = logits(model)
    assert torch.equal(without, logits(emptied))
    assert not torch.equal(without, plain)
    assert torch.equal(logits(model), plain)


def test_off_refill_never_gives_the_expert_a_slot_and_is_undone(opened):
    _, model, layers = opened
    plain, triples = logits(model), []

    def change(layer, triple):
        triples.append((triple, off_refill(layer, triple, mark(0, 5))))
        return triples[-1][1]

    with changed(layers, change):
        logits(model)
    for before, after in triples:
        assert not torch.isin(after.selected_experts, torch.tensor([0, 5])).any()
        assert torch.equal(before.router_logits[:, 1:5], after.router_logits[:, 1:5])
    assert torch.equal(logits(model), plain)


def test_nothing_off_is_nothing_changed(opened):
    _, model, layers = opened
    plain, nobody = logits(model), mark()
    for change in (
        lambda layer, t: off_empty(t, nobody),
        lambda layer, t: off_empty(t, nobody, keep_sum=True),
        lambda layer, t: off_refill(layer, t, nobody),
        lambda layer, t: scaled(t, mark(3), 1.0),
        lambda layer, t: biased(layer, t, torch.zeros(8)),
        lambda layer, t: forced(layer, t, nobody, nobody),
    ):
        with changed(layers, change):
            assert torch.equal(logits(model), plain)


def test_promoted_are_chosen_by_every_token_and_suppressed_by_none(opened):
    family, model, layers = opened
    plain, seen = logits(model), []
    last = (6, 7) if family in GROUPED else (2, 7)
    with (
        changed(layers, lambda layer, triple: forced(layer, triple, mark(*last), mark(0, 4))),
        watched(layers, lambda one: seen.append(one.triple)),
    ):
        logits(model)
    for triple in seen:
        assert (triple.selected_experts.sort(-1).values == torch.tensor(last)).all()
        assert (triple.routing_weights > 0).all()
    assert torch.equal(logits(model), plain)


def test_the_bias_of_the_selection_does_not_undo_a_promotion():
    """The variant that edits logits alone: where a bias is added for the selection, others keep their place."""
    layer = open_layers(tiny("DeepSeek-V3"))[0]
    triple = Triple(*(value.detach() for value in layer.router(torch.randn(64, 32))))
    logs_TN = triple.router_logits.log_softmax(-1)
    logs_TN[:, 6] = logs_TN.amax(-1) + 0.01
    assert not (layer.rescore(logs_TN).selected_experts == 6).any(-1).all()
    assert (forced(layer, triple, mark(6), mark()).selected_experts == 6).any(-1).all()
    suppressed = forced(layer, triple, mark(), mark(1, 6))
    assert not torch.isin(suppressed.selected_experts, torch.tensor([1, 6])).any()


def test_a_promotion_in_half_precision_keeps_its_margin():
    layer = open_layers(tiny("Mixtral").bfloat16())[0]
    layer.router.weight.data.mul_(0.01)  # nearly equal: at log 1/8 the margin is below the spacing of bfloat16
    h_TD = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    triple = Triple(*(value.detach() for value in layer.router(h_TD)))
    forced_ = forced(layer, triple, mark(3, 4), mark())
    assert (forced_.selected_experts.sort(-1).values == torch.tensor([3, 4])).all()
    assert forced_.router_logits.dtype == torch.bfloat16
    assert forced_.routing_weights.dtype == triple.routing_weights.dtype


def test_a_bias_moves_the_choice_as_the_router_would():
    """Added to the logits it is a router with a bias of its own: GptOss has one."""
    model = tiny("GptOss")
    layers, bias = open_layers(model), torch.linspace(-2, 2, 8)
    other = copy.deepcopy(model)
    for layer in open_layers(other):
        layer.router.bias.data += bias
    with changed(layers, lambda layer, triple: biased(layer, triple, bias)):
        assert torch.allclose(logits(model), logits(other), atol=1e-5)


def test_changes_nest_the_first_entered_acts_first():
    model = tiny("Mixtral")
    layers, order = open_layers(model), []

    def named(name):
        return lambda layer, triple: order.append(name) or triple

    with changed(layers, named("outer")), changed(layers, named("inner")):
        logits(model)
    assert order == ["outer", "inner"] * 3


triples = st.builds(
    lambda seed, T, K: Triple(
        torch.randn(T, 6, generator=torch.Generator().manual_seed(seed)),
        torch.rand(T, K, generator=torch.Generator().manual_seed(seed + 1)),
        torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed + t))[:K] for t in range(T)]),
    ),
    st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 4),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(triples, st.sets(st.integers(0, 5)), st.just(0.0) | st.floats(1e-3, 64), st.booleans())
def test_scaling_is_the_slow_loop(triple, experts, factor, keep_sum):
    out = scaled(triple, mark(*experts, num_experts=6), factor, keep_sum=keep_sum)
    assert torch.equal(out.selected_experts, triple.selected_experts)
    assert torch.equal(out.router_logits, triple.router_logits)
    for t in range(len(triple.router_logits)):
        slots = list(zip(triple.selected_experts[t].tolist(), triple.routing_weights[t].tolist(), strict=True))
        expected = [w * factor if e in experts else w for e, w in slots]
        if not any(e in experts for e, _ in slots):
            assert torch.equal(out.routing_weights[t], triple.routing_weights[t])
        elif keep_sum and sum(expected) > 0:
            ratio = sum(w for _, w in slots) / sum(expected)
            expected = [w * ratio for w in expected]
        assert out.routing_weights[t].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2-MoE", "GraniteMoe", "GptOss"])
def test_suppressing_an_expert_leaves_the_tokens_alone_that_never_chose_it(family):
    layer = open_layers(tiny(family))[0]
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    plain, none = layer.rescore(logits), torch.zeros(8, dtype=torch.bool)
    expert = torch.arange(8) == 5
    moved = forced(layer, plain, none, expert)
    without = ~(plain.selected_experts == 5).any(-1)
    assert without.any()
    assert torch.equal(moved.selected_experts[without], plain.selected_experts[without])
    assert not (moved.selected_experts == 5).any()


@pytest.mark.parametrize("family", ["DeepSeek-V3", "GLM-4-MoE"])
def test_in_sigmoid_families_no_weight_of_such_tokens_moves(family):
    layer = open_layers(tiny(family, n_group=1, topk_group=1))[0]  # groups may choose otherwise: their scores changed
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    plain, none = layer.rescore(logits), torch.zeros(8, dtype=torch.bool)
    moved = forced(layer, plain, none, torch.arange(8) == 5)
    without = ~(plain.selected_experts == 5).any(-1)
    assert torch.equal(moved.selected_experts[without], plain.selected_experts[without])
    torch.testing.assert_close(moved.routing_weights[without], plain.routing_weights[without])
