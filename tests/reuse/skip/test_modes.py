# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import watched
from anabranch.reuse.skip.modes import candidates, divergence, evaluator, frontier, layer_weights, search, skipping

BATCH = {"input_ids": torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1)),
         "attention_mask": torch.ones(3, 12, dtype=torch.long)}  # fmt: skip
BATCH["attention_mask"][2, 6:] = 0
BATCH["classes"] = (BATCH["input_ids"] > 50).long()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], use_cache=False).logits


def full_grid(evaluate, first, second, rho):
    """Every pair; slow on purpose."""
    tried = [(*evaluate(a, b), a, b) for a in first for b in second]
    return min(distance for distance, share, *_ in tried if share >= rho)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), rho=st.floats(0, 1), rows=st.integers(1, 10), columns=st.integers(1, 10),
    flat=st.booleans(),
)  # fmt: skip
def test_the_frontier_finds_what_the_full_grid_finds(seed, rho, rows, columns, flat):
    g = torch.Generator().manual_seed(seed)

    def rising():
        steps = torch.rand(rows, columns, generator=g, dtype=torch.float64)
        steps = steps * (steps > 0.6) if flat else steps
        return steps.cumsum(0).cumsum(1)

    distances, shares = rising(), rising()
    shares = shares / shares[-1, -1].clamp(min=1e-9)
    evaluate = lambda a, b: (float(distances[int(a), int(b)]), float(shares[int(a), int(b)]))  # noqa: E731
    if shares[-1, -1] < rho:
        return
    found = frontier(evaluate, list(range(rows)), list(range(columns)), rho)
    assert found.divergence == full_grid(evaluate, range(rows), range(columns), rho)
    assert found.share >= rho
    assert (found.divergence, found.share) == evaluate(*found.taus)
    assert found.runs <= rows + columns - 1


def test_ten_by_ten_on_a_layer_equals_the_full_grid():
    """In one mixture layer the share only grows with a threshold, and the divergence does on this text."""
    model = tiny("Mixtral", num_hidden_layers=1)
    layers = mixture_layers(model)
    alpha = {layers[0].name: 1.0}
    first, second = (values[:-1] for values in candidates(model, [BATCH], alpha, 9))
    assert (len(first), len(second)) == (10, 10)
    evaluate = evaluator(model, layers, [BATCH], alpha, [logits_of(model)], False)
    with torch.no_grad():
        for rho in (0.2, 0.5, 0.7):
            found = frontier(evaluate, first, second, rho)
            assert found.divergence == pytest.approx(full_grid(evaluate, first, second, rho))
            assert found.runs <= 19


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3", "OLMoE"])
def test_thresholds_of_zero_are_the_model_bit_for_bit(family):
    model = tiny(family)
    layers = mixture_layers(model)
    with skipping(layers, layer_weights(model, [BATCH]), (0.0, 0.0), BATCH["classes"]) as skipped:
        inside = logits_of(model)
    assert torch.equal(inside, logits_of(model))
    assert skipped.share() == 0
    assert skipped.slots.total() == len(layers) * 36 * 2


def test_a_layer_whose_experts_are_silent_has_no_weight():
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    with torch.no_grad():
        for expert in ExpertBank(layers[1]):
            expert.down.zero_()
    alpha = layer_weights(model, [BATCH])
    assert alpha[layers[1].name] == 0
    assert sum(alpha.values()) == pytest.approx(1)
    with skipping(layers, alpha, (1e-9, 1e-9)) as skipped:  # everything of that layer goes, and nothing is lost
        inside = logits_of(model)
    assert skipped.share(layers[1].name) == 1
    torch.testing.assert_close(inside, logits_of(model), atol=1e-6, rtol=0)
    with torch.no_grad():
        for layer in layers:
            layer.experts.down_proj.zero_()
    assert set(layer_weights(model, [BATCH]).values()) == {0.0}


def test_layer_weights_by_the_definition():
    model = tiny("OLMoE")
    layers, real = mixture_layers(model), BATCH["attention_mask"].bool()
    p, by_hand = logits_of(model).softmax(-1), []
    for layer in layers:
        down = layer.experts.down_proj.data.clone()
        layer.experts.down_proj.data.zero_()
        q = logits_of(model).softmax(-1)
        layer.experts.down_proj.data.copy_(down)
        by_hand.append(float((p * (p / q).log()).sum(-1)[real].mean()))
    alpha = layer_weights(model, [BATCH])
    assert list(alpha.values()) == pytest.approx([value / sum(by_hand) for value in by_hand], rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), low=st.floats(0, 0.6), more=st.floats(0, 0.4), other=st.floats(0, 1),
    keep_sum=st.booleans(),
)  # fmt: skip
def test_the_share_grows_with_each_threshold_and_slots_are_those_of_the_definition(seed, low, more, other, keep_sum):
    g = torch.Generator().manual_seed(seed)
    h_TD, classes = torch.randn(6, 32, generator=g), torch.randint(2, (6,), generator=g)
    plain, shares = [], []
    with torch.no_grad(), watched([LAYER], plain.append):
        LAYER.block(h_TD[None])
    for tau in (low, low + more):
        seen, taus = [], (tau, other)
        with (
            torch.no_grad(), watched([LAYER], seen.append),
            skipping([LAYER], {LAYER.name: 0.7}, taus, classes, keep_sum=keep_sum) as skipped,
        ):  # fmt: skip
            LAYER.block(h_TD[None])
        shares.append(skipped.share())
        for t in range(6):
            before, after = plain[0].triple.routing_weights[t], seen[0].triple.routing_weights[t]
            kept = [0.7 * float(weight) >= taus[classes[t]] for weight in before]
            expected = before * torch.tensor(kept)
            if keep_sum and any(kept) and not all(kept):
                expected = expected * before.sum() / expected.sum()
            torch.testing.assert_close(after, expected)
    assert shares[0] <= shares[1]


LAYER = mixture_layers(tiny("Mixtral"))[0]


def test_a_search_keeps_the_layer_that_matters():
    """Planted: the second layer's experts are ten times as loud; half the slots go, mostly elsewhere."""
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    with torch.no_grad():
        for i, factor in enumerate((0.3, 10.0, 0.3)):
            layers[i].experts.down_proj.mul_(factor)
    alpha = layer_weights(model, [BATCH])
    assert max(alpha, key=alpha.get) == layers[1].name
    found = search(model, [BATCH], alpha, 0.5, count=6)
    assert found.share >= 0.5
    assert found.runs <= 2 * 8 - 1
    with skipping(layers, alpha, found.taus, BATCH["classes"], BATCH["attention_mask"]) as skipped:
        changed = logits_of(model)
    total, tokens = divergence(logits_of(model), changed, BATCH["attention_mask"].reshape(-1).bool())
    assert total / tokens == pytest.approx(found.divergence, rel=1e-4, abs=1e-7)
    assert skipped.share() == found.share
    assert skipped.share(layers[1].name) < 0.2
    equal = dict.fromkeys(alpha, 1 / 3)  # control: as if every layer mattered alike
    assert search(model, [BATCH], equal, 0.5, count=6).divergence > 5 * found.divergence


def test_text_alone_has_one_threshold():
    model = tiny("Mixtral")
    text = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    alpha = layer_weights(model, [text])
    first, second = candidates(model, [text], alpha, 4)
    assert (len(first), second, first[0], first[-1]) == (6, [0.0], 0.0, math.inf)
    assert search(model, [text], alpha, 1.0, count=4).share == 1
    assert search(model, [text], alpha, 0.0, count=4).divergence == 0


def test_wrong_uses_say_what_was_expected():
    layers = mixture_layers(tiny("Mixtral"))
    alpha = {layer.name: 1.0 for layer in layers}
    with pytest.raises(UsageError, match="does not name every layer"), skipping(layers, {}, (0.1, 0.1)):
        pass
    with pytest.raises(UsageError, match="two numbers >= 0"), skipping(layers, alpha, (0.1, -1)):
        pass
    with (
        pytest.raises(UsageError, match="36 of 0 and 1"),
        skipping(layers, alpha, (0.1, 0.1), torch.full((3, 12), 2)),
    ):
        layers[0].block(torch.zeros(1, 36, 32))
    with pytest.raises(UsageError, match=r"expected: a share of 0.9\n.*received: 0.5 at most"):
        frontier(lambda a, b: (0.0, 0.5), [0.0, 1.0], [0.0], 0.9)
    with pytest.raises(UsageError, match="have to rise"):
        frontier(lambda a, b: (0.0, 0.5), [1.0, 1.0], [0.0], 0.9)
    with pytest.raises(UsageError, match="no share"):
        frontier(lambda a, b: (0.0, 0.5), [1.0], [0.0], 2)
    with pytest.raises(UsageError, match="no calibration text"):
        layer_weights(tiny("Mixtral"), [])
