# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import Context, Mixture, ModuleBank, importance_loss, prob, route, routings, straight_through
from anabranch.mixture.dispatch import combine
from anabranch.testing import check_mixture


class Block(nn.Module):
    """A residual block, called with options as transformers calls its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(6)

    def forward(self, hidden_states, attention_mask=None, *, scale=1.0):
        return hidden_states + scale * self.inner(self.norm(hidden_states)) + hidden_states.mean(1, keepdim=True)


def ids(*values):
    return Context(ids={"cluster": torch.tensor(values)})


@pytest.fixture
def x(small):
    return torch.randn(7, 3, small.width, generator=small.seeded(2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "kind", ["cluster", "cluster-prob", "token-1", "token-2", "fixed", "universal", "blocks", "stacked"]
)
def test_contract(small, x, kind, seed):
    def make():
        bank = small.bank(seed=seed)
        if kind.startswith("token"):
            return Mixture(small.token_router(top_k=int(kind[-1]), seed=seed), bank)
        if kind == "fixed":
            return Mixture(small.fixed_router(), bank)
        if kind == "universal":
            return Mixture(small.cluster_router(weigh=prob, seed=seed), bank, universal=small.feed_forward(9))
        if kind == "blocks":
            return Mixture(small.cluster_router(seed=seed), ModuleBank(Block(e) for e in bank.experts))
        if kind == "stacked":
            return Mixture(small.cluster_router(seed=seed), bank.stacked())
        return Mixture(
            small.cluster_router(seed=seed, weigh=prob if kind == "cluster-prob" else straight_through), bank
        )

    check_mixture(make, x, seed=seed)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 2), st.integers(0, 2**31))
def test_gradients_of_dispatch_are_those_of_a_loop(choices, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = [nn.Linear(3, 3).double() for _ in range(5)]
    for expert in experts:
        nn.init.normal_(expert.weight, generator=generator)
    bank = ModuleBank(experts)
    selected = torch.tensor([[c, c + 1][:top_k] for c in choices])
    rows = torch.randn(len(choices), 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(selected.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    fast = combine(rows, selected, weights, bank)
    loop = torch.stack(
        [
            sum(w * experts[e](row) for e, w in zip(es, ws, strict=True))
            for row, es, ws in zip(rows, selected, weights, strict=True)
        ]
    )
    assert torch.allclose(fast, loop)
    wanted = [rows, weights, *(experts[e].weight for e in selected.unique().tolist())]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (fast, loop)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("kind", ["cluster_router", "token_router"])
def test_one_expert_is_the_dense_module_bit_by_bit_also_in_training(small, x, kind):
    options = {"top_k": 1} if kind == "token_router" else {}
    dense, model = small.feed_forward(), small.layer(getattr(small, kind)(num_experts=1, **options))
    model.bank = type(model.bank).from_template(dense, 1)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (dense, model)]
    for step in range(5):
        context = Context(ids={"cluster": torch.arange(7) % 5}, generator=small.seeded(step))
        with route(model, context):
            outputs = [dense(x), model(x)]
        assert torch.equal(*outputs)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.bank[0].parameters(), strict=True))


def test_insertion_with_straight_through_keeps_the_function_for_every_cluster(small, x):
    dense = small.feed_forward()
    layer = small.layer().eval()
    layer.bank = type(layer.bank).from_template(dense, small.experts)
    with route(layer, ids(0, 1, 2, 3, 4, 0, 1)):
        assert torch.allclose(layer(x), dense(x), atol=1e-6)


@pytest.mark.parametrize("cluster", range(5))
def test_one_cluster_is_its_extracted_expert_bit_by_bit(small, x, cluster):
    layer = small.layer().eval()
    with route(layer, ids(*[cluster] * 7)):
        routed = layer(x)
    assert torch.equal(routed, layer.bank.extract(int(layer.router.table()[cluster]))(x))


def test_a_sorted_batch_and_a_shuffled_one_agree(small, x):
    layer = small.layer(small.fixed_router()).eval()
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    clusters = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    with route(layer, Context(ids={"cluster": clusters})):
        y = layer(x)
    with route(layer, Context(ids={"cluster": clusters[order]})):
        assert torch.allclose(layer(x[order]), y[order], atol=1e-6)


def test_experts_without_images_stay_bit_by_bit_under_weight_decay(small, x):
    layer = small.layer(small.fixed_router())
    before = copy.deepcopy(layer.bank)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    with route(layer, ids(2, 2, 2, 2, 2, 2, 2)):
        layer(x).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(layer.bank[e].fc1.weight, before[e].fc1.weight) for e in range(4)]
    assert moved == [False, False, True, False]
    assert layer.bank[0].fc1.weight.grad is None


@pytest.mark.parametrize("weigh", [0.0, 1.0, 0.25])
def test_the_universal_expert_takes_the_rest_of_the_weight(small, x, weigh):
    universal = small.feed_forward(9)
    layer = small.layer(small.fixed_router())
    layer.router.weigh = lambda logits, selected: torch.full(selected.shape, weigh)
    layer.universal = universal
    with route(layer, ids(*[1] * 7)):
        expected = weigh * layer.bank.run(1, x) + (1 - weigh) * universal(x)
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_options_reach_the_blocks_and_tensors_are_refused(small, x):
    bank = ModuleBank(Block(e) for e in small.bank().experts)
    layer = Mixture(small.fixed_router(), bank).eval()
    with route(layer, ids(*[1] * 7)):
        assert torch.equal(layer(x, None, scale=0.5), bank[1](x, scale=0.5))
        with pytest.raises(UsageError, match="cannot be split"):
            layer(x, scale=torch.ones(7))
        with pytest.raises(UsageError, match="hidden states and keyword options only"):
            layer(x, torch.ones(7))


def test_samples_may_have_any_shape_and_tokens_may_not(small):
    patches = ModuleBank.from_template(nn.Conv2d(1, 6, 4, stride=4), 4, noise=1.0, generator=small.seeded())
    layer = Mixture(small.fixed_router(), patches)
    images = torch.rand(3, 1, 8, 8, generator=small.seeded())
    with route(layer, ids(3, 0, 2)):
        y = layer(images)
    assert torch.allclose(y, torch.cat([patches[e](images[i : i + 1]) for i, e in enumerate((3, 0, 2))]), atol=1e-6)
    with pytest.raises(UsageError, match=r"tokens are routed in \(B, N, D\)"):
        small.layer(small.token_router()).eval()(torch.rand(3, 6))


def test_a_bank_of_another_size_than_the_router_is_refused(small):
    with pytest.raises(UsageError, match=r"router and bank differ(.|\n)*3 experts"):
        Mixture(small.cluster_router(), small.bank(3))


def test_no_graph_outlives_its_step(small, x):
    layer = small.layer()
    with route(layer, Context(ids={"cluster": torch.arange(7) % 5}, generator=small.seeded())):
        layer(x)
    taken = routings(layer)
    assert taken[""].router_logits.requires_grad
    assert layer.slot.routing is None
    importance_loss(taken[""]).backward()
    assert layer.router.score.gate.weight.grad.abs().sum() > 0


def test_a_training_layer_whose_record_has_no_gradient_is_reported_unless_gradients_are_off(small, x):
    layer = small.layer()
    with torch.no_grad(), route(layer, Context(ids={"cluster": torch.arange(7) % 5}, generator=small.seeded())):
        layer(x)
        assert set(routings(layer)) == {""}
        layer(x)
    with pytest.raises(UsageError, match="has no gradients"):
        routings(layer)


def test_the_state_dict_restores_the_layer(small, x):
    layer, other = small.layer(seed=0).eval(), small.layer(seed=1).eval()
    other.load_state_dict(layer.state_dict())
    results = []
    for model in (layer, other):
        with route(model, ids(*[4, 3, 2, 1, 0, 0, 1])):
            results.append(model(x))
    assert torch.equal(*results)


def test_the_global_generator_is_left_alone(small, x):
    layer = small.layer()
    before = torch.get_rng_state()
    with route(layer, Context(ids={"cluster": torch.arange(7) % 5}, generator=small.seeded())):
        layer(x).sum().backward()
    layer.bank.perturb([0], 1e-2, small.seeded())
    assert torch.equal(before, torch.get_rng_state())
