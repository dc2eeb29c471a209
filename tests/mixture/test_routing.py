# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import (
    Context,
    FixedTable,
    GateNoise,
    LinearScore,
    Mixture,
    ModuleBank,
    Router,
    TableScore,
    TopK,
    prob,
    renormalised,
    route,
    routings,
    straight_through,
)
from anabranch.mixture.context import Frame
from anabranch.mixture.routing import Adjust
from anabranch.testing import check_router

WEIGHS = {1: (prob, straight_through, renormalised), 2: (prob, renormalised)}


class ExpertBias(Adjust):
    """A shift of what is selected, as balancing controllers use it."""

    def __init__(self, bias):
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, router_logits, draw):
        return self.bias

    def take(self, experts):
        return ExpertBias(self.bias[list(experts)])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tokens(x, router):
    """The routing of (B, N, D) in eval."""
    return router.eval()(x, None)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    num_experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    kind=st.sampled_from(["token", "centroid", "learned"]),
    weigh=st.integers(0, 2),
    temperature=st.sampled_from([1.0, 0.1]),
)
def test_contract_of_learned_routers(seed, num_experts, top_k, kind, weigh, temperature):
    def make():
        if kind == "token":
            score = LinearScore(8, num_experts, generator=seeded(seed))
        else:
            table = torch.randn(7, 3, generator=seeded(seed))
            score = TableScore(table, num_experts, generator=seeded(seed), cluster_embedding=kind)
        choices = WEIGHS[top_k]
        return Router(
            score,
            adjust=[GateNoise()],
            select=TopK(top_k),
            weigh=choices[weigh % len(choices)],
            temperature=temperature,
        )

    check_router(make, seed=seed)


def test_contract_of_the_fixed_table():
    check_router(lambda: Router(FixedTable(torch.tensor([2, 0, 1, 2]), 3)))


def test_contract_of_an_adjustment_that_only_selects():
    check_router(
        lambda: Router(
            LinearScore(8, 4, generator=seeded(0)),
            adjust=[ExpertBias(torch.linspace(2, -2, 4))],
            select=TopK(2),
            weigh=renormalised,
        )
    )


def test_an_adjustment_that_declares_nothing_chooses_and_weighs_nothing():
    router = Router(
        LinearScore(8, 4, generator=seeded(1)), adjust=[ExpertBias(torch.tensor([0.0, 0.0, 0.0, 50.0]))], weigh=prob
    )
    x = torch.randn(2, 5, 8, generator=seeded(0))
    routing = tokens(x, router)
    expected = router.score(x).softmax(-1)[..., 3].flatten()
    assert routing.selected_experts.eq(3).all()
    torch.testing.assert_close(routing.routing_weights[:, 0], expected)


def test_contract_finds_a_router_that_couples_the_batch():
    def share_of_the_batch(router_logits, selected_experts):
        return router_logits.softmax(0).gather(1, selected_experts)

    router = Router(LinearScore(8, 4, generator=seeded(0)), weigh=share_of_the_batch)
    with pytest.raises(AssertionError, match="depends on the rest of the batch"):
        check_router(lambda: router)


def test_closed_form_of_the_three_weights():
    logits, selected = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[0, 1]])
    assert prob(logits, selected)[0].tolist() == pytest.approx([0.6439, 0.2369], abs=1e-4)
    assert renormalised(logits, selected)[0].tolist() == pytest.approx([0.7311, 0.2689], abs=1e-4)
    assert straight_through(logits, selected[:, :1]).item() == 1.0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=8), st.floats(0.01, 10))
def test_straight_through_is_one_bitwise_for_the_chosen_expert(logits, temperature):
    logits = torch.tensor([logits]) / temperature
    assert straight_through(logits, logits.argmax(1, keepdim=True)).item() == 1.0


@pytest.mark.parametrize(("weigh", "learns"), [(prob, True), (straight_through, True), (renormalised, False)])
@pytest.mark.parametrize("kind", ["cluster_router", "token_router"])
def test_a_top_1_gate_learns_unless_it_is_renormalised(small, weigh, learns, kind):
    options = {"top_k": 1} if kind == "token_router" else {}
    layer = small.layer(getattr(small, kind)(weigh=weigh, **options)).eval()
    x = torch.randn(6, 3, small.width, generator=small.seeded())
    with route(layer, Context(ids={"cluster": torch.tensor([0, 1, 2, 3, 4, 0])})):
        layer(x).square().sum().backward()
    gradient = layer.router.score.gate.weight.grad
    assert bool((gradient != 0).any()) == learns


def test_straight_through_gives_the_gradient_of_log_p(small):
    logits = torch.randn(5, 4, generator=small.seeded(), dtype=torch.float64, requires_grad=True)
    selected = logits.argmax(1, keepdim=True)
    (straight,) = torch.autograd.grad(straight_through(logits, selected).sum(), logits)
    (log_p,) = torch.autograd.grad(logits.log_softmax(1).gather(1, selected).sum(), logits)
    assert torch.allclose(straight, log_p)


def test_the_gate_sees_the_cluster_and_nothing_else(small):
    router = small.cluster_router().eval()
    layer = Mixture(router, ModuleBank(nn.Identity() for _ in range(small.experts)))
    context = Context(ids={"cluster": torch.tensor([3, 1, 3])})
    scores = []
    for seed, length in ((0, 2), (1, 2), (2, 9)):
        with route(layer, context):
            layer(torch.randn(3, length, small.width, generator=small.seeded(seed)))
        scores.append(routings(layer)[""].scores)
    assert all(torch.equal(s, scores[0]) for s in scores)
    assert torch.equal(scores[0][0], scores[0][2])
    assert not torch.equal(scores[0][0], scores[0][1])


def test_every_image_of_a_cluster_sees_the_same_noise(small):
    router = small.cluster_router()
    layer = Mixture(router, ModuleBank(nn.Identity() for _ in range(small.experts)))
    with route(layer, Context(ids={"cluster": torch.tensor([2, 0, 2, 2])}, generator=small.seeded())):
        layer(torch.zeros(4, 1, small.width))
    scores = routings(layer)[""].scores
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores[0], scores[3])
    assert not torch.equal(scores[0], router.decide(router.score(), None).scores[2])


def test_gate_noise_has_the_standard_deviation_of_one_over_experts():
    zeros = torch.zeros(20_000, 8)
    noise = GateNoise()(zeros, lambda like: torch.randn(like.shape, generator=seeded(0)))
    assert noise.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_the_table_is_the_argmax_of_the_gate_over_centroids(small):
    router = small.cluster_router()
    expected = (router.score.embedding @ router.score.gate.weight.T).argmax(1)
    assert torch.equal(router.table(), expected)
    assert torch.equal(Router(FixedTable(torch.tensor([1, 0, 2]), 3)).table(), torch.tensor([1, 0, 2]))
    with pytest.raises(UsageError, match="has no table"):
        small.token_router().table()


def test_centroids_stay_and_learned_embeddings_move(small):
    for kind, moves in (("centroid", False), ("learned", True)):
        score = TableScore(small.centroids(), small.experts, generator=small.seeded(), cluster_embedding=kind)
        assert ("embedding" in dict(score.named_parameters())) == moves
        assert "embedding" in score.state_dict()


def test_a_fixed_table_is_one_hot_and_trains_nothing():
    router = Router(FixedTable(torch.tensor([1, 0, 2]), 3), weigh=prob)
    decided = router.decide(router.score(), None)
    assert torch.equal(decided.scores, torch.eye(3)[[1, 0, 2]])
    assert decided.routing_weights[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert list(router.parameters()) == []


def test_equal_logits_go_to_the_lower_expert():
    zeros = torch.zeros(5, 40)
    assert TopK(1)(zeros).unique().tolist() == [0]
    assert TopK(3)(zeros).tolist() == [[0, 1, 2]] * 5


def test_temperature_sharpens_the_weights_and_leaves_the_choice(small):
    x = torch.randn(4, 3, 8, generator=small.seeded())
    warm, cold = (
        tokens(x, Router(LinearScore(8, 4, generator=small.seeded()), weigh=prob, temperature=t)) for t in (1.0, 0.05)
    )
    assert torch.equal(warm.selected_experts, cold.selected_experts)
    assert torch.allclose(cold.scores, (warm.router_logits / 0.05).softmax(1))


def test_logits_are_fp32_under_autocast_and_in_a_bf16_model():
    x = torch.randn(2, 3, 8, generator=seeded(0))
    router = Router(LinearScore(8, 4, generator=seeded(0)))
    plain = tokens(x, router)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokens(x, router).router_logits, plain.router_logits)
    assert tokens(x.bfloat16(), router.bfloat16()).router_logits.dtype == torch.float32


def test_gates_are_drawn_from_the_generator_given():
    before = torch.get_rng_state()
    first, second = (LinearScore(16, 4, generator=seeded(3)).gate.weight for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max().item() <= 1 / math.sqrt(16)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": TopK(5)}, r"top_k: expected 1..num_experts \(4\), received 5"),
        ({"select": TopK(2)}, "weigh: expected prob or renormalised with top_k 2, received straight_through"),
        ({"temperature": 0.0}, "temperature: expected > 0, received 0.0"),
    ],
)
def test_wrong_routers_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        Router(LinearScore(8, 4, generator=seeded(0)), **options)


def test_wrong_tables_say_what_was_expected(small):
    with pytest.raises(ValueError, match=r"assignment: expected experts 0..2, received 0..3"):
        FixedTable(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="cluster_embedding: expected centroid or learned, received both"):
        TableScore(small.centroids(), 4, generator=small.seeded(), cluster_embedding="both")
    with pytest.raises(UsageError, match=r"assigned to experts \[2\]"):
        FixedTable(torch.tensor([0, 2]), 3).take([0, 1])


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_gate_noise_is_a_share_of_the_experts_unless_it_is_given(shape):
    """By cluster and by token: 1 / E, not 1 over the number of tokens."""
    logits = torch.zeros(shape)
    assert torch.equal(GateNoise()(logits, torch.ones_like), torch.full(shape, 1 / 4))
    assert torch.equal(GateNoise(0.3)(logits, torch.ones_like), torch.full(shape, 0.3))
    assert float(GateNoise()(logits, None)) == float(GateNoise(0.0)(logits, torch.ones_like)) == 0.0


def test_a_router_over_fewer_experts_than_it_chooses_is_refused(small):
    with pytest.raises(ValueError, match=r"top_k: expected 1..num_experts \(1\), received 2"):
        small.token_router(top_k=2).take([3])


def test_what_is_chosen_under_noise_is_what_is_likeliest_under_the_same_noise(small):
    """The noise is a part of p: with another one, or the opposite one, a weight would be of an expert nobody chose."""
    router = small.token_router(top_k=2).train()
    router.adjust[0].std = 3.0
    context = Context(generator=small.seeded(1))
    with torch.no_grad():
        routing = router(torch.randn(4, 8, small.width, generator=small.seeded(2)), Frame(context, seed=5))
    assert torch.equal(routing.scores.topk(2).indices, routing.selected_experts)
    assert not torch.equal(routing.router_logits.topk(2).indices, routing.selected_experts)
    chosen = routing.scores.gather(1, routing.selected_experts)
    torch.testing.assert_close(routing.routing_weights, chosen / chosen.sum(1, keepdim=True))
