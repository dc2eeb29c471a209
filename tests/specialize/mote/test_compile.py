# SPDX-License-Identifier: Apache-2.0
"""Compiled, step experts are what they are uncompiled: logits, gradients, and whose expert acts on which token."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from anabranch.mixture.context import Context, route
from anabranch.mixture.lora import lora_layers
from tests.specialize.mote.tiny import tiny

# torch's own, where a graph begins with a tensor that another one made
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

FEW = ("q_proj", "down_proj")  # a square layer and an oblong one: compiling all of them takes long
TOKENS = torch.randint(46, (3, 12), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(-2, 3, (3, 12), generator=torch.Generator().manual_seed(3))
OTHER_IDS = torch.where(IDS >= 0, (IDS + 1) % 3, IDS)


@pytest.fixture(autouse=True)
def nothing_compiled_before_or_after():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh(targets=FEW):
    return tiny(dropout=0.0, targets=targets).train()


def results(run, model, *inputs):
    """Output, and gradients of everything that learns."""
    model.zero_grad()
    out = run(*inputs)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(received, expected):
    torch.testing.assert_close(received, expected, atol=1e-5, rtol=1e-5)


def check_ids_matter(run, plain, model, first, second, *inputs):
    """Two calls of one compiled function that differ in their ids alone, and a third in memory that was changed."""
    expected = [results(plain, model, *inputs, ids) for ids in (first, second)]
    received = [results(run, model, *inputs, ids) for ids in (first, second)]
    check_same(received, expected)
    moved = expected[1][0] - expected[0][0]
    assert moved.abs().max() > 0.1
    check_same(received[1][0] - received[0][0], moved)
    ids = first.clone()
    results(run, model, *inputs, ids)
    check_same(results(run, model, *inputs, ids.copy_(second)), expected[1])
    check_same(results(run, model, *inputs, first), expected[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FEW)
def test_a_layer_is_the_same_compiled_whatever_the_ids_and_the_length(name, backend):
    mote = fresh()
    layer = next(layer for path, layer in lora_layers(mote.model).items() if path.endswith(name))
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(3, 12, layer.in_features, generator=torch.Generator().manual_seed(4))

    def plain(x, ids):
        with route(mote.model, Context(ids={"step": ids})):
            return layer(x)

    def run(x, ids):
        with route(mote.model, Context(ids={"step": ids})):
            return compiled(x)

    check_ids_matter(run, plain, layer, IDS, OTHER_IDS, x)
    check_ids_matter(run, plain, layer, IDS[:2, :7], OTHER_IDS[:2, :7], x[:2, :7])


def routed_outside(mote, backend):
    """The language model is compiled, and told the ids by who calls it."""
    compiled = torch.compile(mote.model, backend=backend)

    def run(tokens, ids):
        with route(mote.model, Context(ids={"step": ids})):
            return compiled(input_ids=tokens).logits

    return run


def routed_inside(mote, backend):
    """The mixture is compiled, with its context."""
    compiled = torch.compile(mote, backend=backend)
    return lambda tokens, ids: compiled(tokens, ids).logits


@pytest.mark.parametrize(("how", "backend"), [(routed_inside, "aot_eager"), (routed_outside, "eager")])
def test_a_model_is_the_same_compiled_whatever_the_ids(how, backend):
    mote = fresh()
    counter = CompileCounterWithBackend(backend)
    run = how(mote, counter)
    check_ids_matter(run, lambda tokens, ids: mote(tokens, ids).logits, mote, IDS, OTHER_IDS, TOKENS)
    compiled = counter.frame_count
    assert compiled > 0
    later = torch.randint(-2, 3, (3, 12), generator=torch.Generator().manual_seed(5))
    check_same(run(TOKENS, later), mote(TOKENS, later).logits)
    assert counter.frame_count == compiled  # other ids are no reason to compile again


def test_what_is_kept_where_nothing_learns_is_not_kept_for_other_ids_or_weights():
    mote = fresh().eval()
    run = routed_inside(mote, "eager")
    with torch.no_grad():
        for ids in (IDS, OTHER_IDS):
            check_same(run(TOKENS, ids), mote(TOKENS, ids).logits)
        before = run(TOKENS, IDS)
        for name, parameter in mote.trained().items():
            if "lora_B" in name:
                parameter.mul_(2)
        check_same(run(TOKENS, IDS), mote(TOKENS, IDS).logits)
        assert not torch.allclose(run(TOKENS, IDS), before, atol=1e-2)


@pytest.mark.parametrize("learning", [True, False])
def test_a_model_with_experts_on_all_layers_is_compiled_to_its_end(learning):
    mote = fresh("all-linear").train(learning)
    run = routed_inside(mote, "eager")
    to_its_end = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # else the rest runs uncompiled
    with to_its_end, torch.set_grad_enabled(learning):
        for ids in (IDS, OTHER_IDS):
            check_same(run(TOKENS, ids), mote(TOKENS, ids).logits)
