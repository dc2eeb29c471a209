# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing runs blocks again in the backward pass, after their context was left."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anabranch.errors import UsageError
from anabranch.mixture import Context, importance_loss, route, routings

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


class Blocks(nn.Module):
    """Two blocks, each with a mixture layer, run under checkpointing or not."""

    def __init__(self, small, router):
        super().__init__()
        self.embed = nn.Linear(small.width, small.width, bias=False)
        self.embed.weight.data.copy_(torch.eye(small.width))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(small.width), small.layer(router(seed=seed))) for seed in range(2)
        )
        self.reentrant = None

    def forward(self, x):
        x = self.embed(x)
        for block in self.layers:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x.square().mean()


def contexts(small):
    """Two batches of one size whose clusters, and noise, differ."""
    return [
        Context(ids={"cluster": torch.tensor(ids)}, generator=small.seeded(seed))
        for seed, ids in enumerate([[0, 1, 2], [4, 3, 3]])
    ]


def gradients(model, small, run):
    model.zero_grad()
    run(model, torch.randn(3, 2, small.width, generator=small.seeded(9)), contexts(small))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward_after_leaving(model, x, contexts):
    with route(model, contexts[0], recompute=True):
        loss = model(x)
    loss.backward()


def two_contexts_before_one_backward(model, x, contexts):
    losses = []
    for context in contexts:
        with route(model, context, recompute=True):
            losses.append(model(x))
    (losses[0] + 2 * losses[1]).backward()


def backward_inside_another_context(model, x, contexts):
    with route(model, contexts[0], recompute=True):
        loss = model(x)
    with route(model, contexts[1], recompute=True):
        loss.backward()
        model(x).backward()


@pytest.mark.parametrize("router", ["cluster_router", "token_router"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "run", [backward_after_leaving, two_contexts_before_one_backward, backward_inside_another_context]
)
def test_gradients_are_those_without_checkpointing(small, router, reentrant, run):
    model = Blocks(small, getattr(small, router))
    expected = gradients(model, small, run)
    model.reentrant = reentrant
    received = gradients(model, small, run)
    assert expected.keys() == received.keys()
    assert any("gate" in name for name in received)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, received[name], atol=1e-6), name


def test_the_second_run_records_nothing(small):
    model = Blocks(small, small.cluster_router)
    model.reentrant = False
    with route(model, contexts(small)[0], recompute=True):
        loss = model(torch.randn(3, 2, small.width, generator=small.seeded()))
    assert len(routings(model)) == 2
    loss.backward()
    assert routings(model) == {}


def test_the_context_of_an_earlier_step_is_not_taken_for_an_unknown_one(small):
    model = Blocks(small, small.cluster_router)
    model.reentrant = False
    x, (first, second) = torch.randn(3, 2, small.width, generator=small.seeded()), contexts(small)
    backward_after_leaving(model, x, [first])
    with route(model, second):
        loss = model(x)
    with pytest.raises(UsageError, match="recompute=True"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_unannounced_second_run_is_an_error_that_says_what_to_pass(small, reentrant):
    model = Blocks(small, small.cluster_router)
    model.reentrant = reentrant
    x, context = torch.randn(3, 2, small.width, generator=small.seeded()), contexts(small)[0]
    with route(model, context):
        loss = model(x)
        with pytest.raises(UsageError, match=r"in the backward pass(.|\n)*recompute=True"):
            loss.backward()


def test_a_loss_on_the_routing_works_without_reentry_and_is_refused_with_it(small):
    model = Blocks(small, small.cluster_router)
    x, context = torch.randn(3, 2, small.width, generator=small.seeded()), contexts(small)[0]
    found = {}
    for model.reentrant in (None, False):
        model.zero_grad()
        with route(model, context, recompute=True):
            loss = model(x)
        (loss + sum(importance_loss(routing) for routing in routings(model).values())).backward()
        found[model.reentrant] = model.layers[0][1].router.score.gate.weight.grad
        context = contexts(small)[0]
    assert torch.allclose(found[None], found[False], atol=1e-6)
    model.reentrant = True
    with route(model, context, recompute=True):
        model(x)
    with pytest.raises(UsageError, match=r"0.1 has no gradients(.|\n)*use_reentrant=False"):
        routings(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_switch_of_transformers_is_seen(small, reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=small.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )
    model = transformers.ViTMAEForPreTraining(config)
    for seed in range(2):
        model.vit.layers[seed].mlp = small.layer(small.cluster_router(seed=seed))
    images, noise = torch.rand(3, 1, 8, 8, generator=small.seeded()), torch.rand(3, 4, generator=small.seeded())

    def run(model, _, contexts):
        with route(model, contexts[0]):
            loss = model(images, noise=noise).loss
        loss.backward()

    expected = gradients(model, small, run)
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    received = gradients(model.train(), small, run)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, received[name], atol=1e-6), name
