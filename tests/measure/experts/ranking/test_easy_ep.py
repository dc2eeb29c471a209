# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import easy_ep
from anabranch.measure.experts.ranking.batches import read_stats
from anabranch.measure.experts.statistics import Collector
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import Triple, open_layers
from anabranch.models.mixtures.routing import Seen
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OTHER, OWN, world


def collected(before_TD, outputs_TKD, weights_TK, selected_TK):
    """What the collector makes of one layer of one pass, written down."""
    model = tiny("OLMoE", num_hidden_layers=1, num_experts=2)
    (layer,) = open_layers(model)
    collector = Collector(model, [layer], ["a"], num_folds=1, residual=True)
    routed_TD = (weights_TK[..., None] * outputs_TKD).sum(1)
    logits_TN = torch.zeros(len(before_TD), 2)
    seen = Seen(layer, Triple(logits_TN, weights_TK, selected_TK), before_TD, routed_TD, outputs_TKD, before_TD)
    real_T = torch.ones(len(before_TD), dtype=torch.bool)
    collector.update(seen, real_T, torch.zeros(len(before_TD), dtype=torch.int64), torch.ones(len(before_TD)).double())
    return collector.stats


def test_an_output_along_the_stream_counts_nothing_and_one_that_reverses_it_twice():
    h = torch.tensor([[3.0, 4.0]])
    slots = torch.tensor([[0, 1]])
    for factor, turn in ((1.0, 0.0), (-2.0, 2.0)):
        outputs = torch.stack([factor * h, factor * h], 1)  # weights of sum 1 give o = factor * h
        scores = easy_ep.rank(collected(h, outputs, torch.tensor([[0.75, 0.25]]), slots), "a")
        norm = 5 * abs(factor)
        assert scores[0].tolist() == pytest.approx([0.75 * norm * turn, 0.25 * norm * turn], abs=1e-6)


def test_two_tokens_and_two_experts_by_hand():
    h = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    outputs = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[0.0, 4.0], [4.0, 0.0]]])
    weights, selected = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0, 1], [1, 0]])
    # token 0: o = (0, 1), h + o = (1, 1), cos = 1/sqrt 2; token 1: o = (2, 2), h + o = (2, 4), cos = 2/sqrt 5
    first, second = 1 - 1 / math.sqrt(2), 1 - 2 / math.sqrt(5)
    scores = easy_ep.rank(collected(h, outputs, weights, selected), "a")
    assert scores[0].tolist() == pytest.approx([0.5 * 2 * first + 0.5 * 4 * second, 0.5 * 4 * second], abs=1e-6)


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3"])
def test_equals_the_slow_loop_shared_experts_left_out(family):
    made = world(1, family=family)
    batch = made.batches[0]
    scores = easy_ep.rank(read_stats(made.model, [batch], LABELS, residual=True), OWN)
    for layer, seen in enumerate(recorded(made.model, batch, outputs=True, residual=True)):
        expected = torch.zeros(8).double()
        for _, _, row, label in real_tokens(batch):
            if label == 0:
                g, slots, h = seen.triple.routing_weights[row].double(), seen.outputs[row].double(), seen.residual[row]
                moved = h.double() + sum(g[k] * slots[k] for k in range(2))
                turn = max(1 - float(h.double() @ moved / (h.double().norm() * moved.norm())), 0)
                for k, e in enumerate(seen.triple.selected_experts[row].tolist()):
                    expected[e] += g[k] * slots[k].norm() * turn
        assert torch.allclose(scores[layer], expected, rtol=1e-4, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), factor=st.floats(0.01, 1000), domains=st.integers(1, 4))
def test_a_domain_of_more_tokens_does_not_outweigh_another_and_any_number_of_experts_is_mixed(seed, factor, domains):
    generator = torch.Generator().manual_seed(seed)
    num_experts = int(torch.randint(2, 12, (), generator=generator))
    names = [f"domain {i}" for i in range(domains)]
    turns = {name: torch.rand(3, num_experts, generator=generator, dtype=torch.float64) + 1e-3 for name in names}
    larger = turns | {names[0]: factor * turns[names[0]]}
    tokens = dict.fromkeys(names, 1)
    mixed, again = (easy_ep.mixed(handmade(tokens, turn=each), names) for each in (turns, larger))
    assert torch.allclose(mixed, again)
    expected = sum(turns[name] / turns[name].sum(1, keepdim=True) for name in names)
    assert torch.allclose(mixed, expected)
    assert mixed.sum(1).tolist() == pytest.approx([domains] * 3)


def test_what_the_released_mixing_would_do_is_refuted():
    """It keeps 128 whatever the model has, and without a layer's share the larger domain decides."""
    turns = {OWN: [[90.0, 5.0, 5.0]], OTHER: [[1.0, 1.0, 8.0]]}
    mixed = easy_ep.mixed(handmade({OWN: 1, OTHER: 1}, turn=turns), [OWN, OTHER])
    assert mixed.tolist()[0] == pytest.approx([1.0, 0.15, 0.85])
    added = torch.tensor(turns[OWN]) + torch.tensor(turns[OTHER])
    assert mixed[0, 2] > 5 * mixed[0, 1]
    assert added[0, 2] < 3 * added[0, 1]
    with pytest.raises(RuntimeError):
        mixed.topk(128)


def test_a_mixture_of_nothing():
    with pytest.raises(UsageError, match=r"domains are mixed[\s\S]*at least one, each once"):
        easy_ep.mixed(handmade({OWN: 1}, turn={OWN: [[1.0]]}), [])
    with pytest.raises(UsageError, match=r"hold no 'turn'"):
        easy_ep.rank(handmade({OWN: 1}, count={OWN: [[1.0]]}), OWN)
