# SPDX-License-Identifier: Apache-2.0
"""SCMoE: the contrast by hand, the ranks from the definition, and decoding that is greedy where it has to be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.models.mixtures.routing import changed, watched
from anabranch.reuse.steer.scmoe import Config, by_rank, contrast, generate, weak_routing

IDS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(1))
NEW = 6


@pytest.fixture(scope="module", params=["Mixtral", "Qwen2-MoE", "DeepSeek-V3", "GptOss"])
def world(request):
    model = tiny(request.param)
    return model, open_layers(model)


def greedy(model, ids, mask=None, num=NEW):
    """Transformers' own."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=num, do_sample=False)


@torch.no_grad()
def slow_generate(model, layers, ids, config, num=NEW):
    """One row, whole passes without a cache."""
    for _ in range(num):
        strong = model(ids, use_cache=False).logits[:, -1]
        with changed(layers, weak_routing(config.ranks)):
            weak = model(ids, use_cache=False).logits[:, -1]
        out = contrast(strong, weak, config.alpha, config.beta)
        ids = torch.cat((ids, out.argmax(-1, keepdim=True)), 1)
        if int(ids[0, -1]) == model.generation_config.eos_token_id:
            break
    return ids


# the contrast


def test_three_tokens_by_hand():
    """s = (2, 1, -1), w = (2, -1, -9): the third is barred, as -1 < log .1 + 2 = -0.30; out = (2, 2, barred) for
    beta .5, and the second token wins for a larger beta: (2, 3) for 1."""
    s, w = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([2.0, -1.0, -9.0])
    assert contrast(s, w, 0.1, 0.5).tolist() == [2.0, 2.0, -math.inf]
    assert contrast(s, w, 0.1, 1.0).tolist() == [2.0, 3.0, -math.inf]
    assert contrast(s, w, 1.0, 9.0).argmax() == 0, "alpha 1 bars all but the likeliest"
    unbarred = (1 + 1.0) * s - 1.0 * w
    assert unbarred.argmax() == 2, "without the bar the least plausible token would win"


@settings(max_examples=150, deadline=None)
@given(V=st.integers(1, 9), alpha=st.floats(0.01, 1), beta=st.floats(0, 5), seed=st.integers(0, 2**31 - 1))
def test_barred_tokens_never_win_and_no_contrast_is_greedy(V, alpha, beta, seed):
    g = torch.Generator().manual_seed(seed)
    s, w = 3 * torch.randn(2, V, generator=g), 3 * torch.randn(2, V, generator=g)
    out = contrast(s, w, alpha, beta)
    slow = [
        [(1 + beta) * float(a) - beta * float(b) if float(a) >= math.log(alpha) + float(max(row)) - 1e-6 else -math.inf
         for a, b in zip(row, other, strict=True)]
        for row, other in zip(s, w, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(out, torch.tensor(slow), rtol=1e-5, atol=1e-4)
    p = s.softmax(-1)
    chosen = p.gather(1, out.argmax(-1, keepdim=True))
    assert (chosen >= alpha * p.amax(-1, keepdim=True) * (1 - 1e-5)).all()
    for no_contrast in (contrast(s, w, alpha, 0.0), contrast(s, s, alpha, beta)):
        assert torch.equal(no_contrast.argmax(-1), s.argmax(-1))
    assert torch.equal(contrast(s + 7, w - 5, alpha, beta).isinf(), out.isinf()) or alpha < 1


# the ranks


def slow_order(layer, logits):
    """Expert ids in the family's order, of those that can be chosen at all: one token, from the definition."""
    name = type(layer.router).__name__
    scores = logits.double()
    if name.startswith("DeepseekV3"):
        scores = scores.sigmoid() + layer.router.e_score_correction_bias.double()
    order = sorted(range(len(scores)), key=lambda e: -float(scores[e]))
    if layer.num_groups == 1:
        return order
    size = len(scores) // layer.num_groups
    groups = [sorted((float(scores[e]) for e in range(g * size, (g + 1) * size)), reverse=True) for g in range(2)]
    value = [sum(own[:2]) for own in groups] if name.startswith("DeepseekV3") else [own[0] for own in groups]
    best = value.index(max(value))
    return [e for e in order if e // size == best]


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V2", "DeepSeek-V3", "GptOss"])
def test_ranks_are_those_of_a_slow_loop_with_groups_and_bias(family):
    layer = open_layers(tiny(family))[-1]
    logits_TN = torch.randn(60, 8, generator=torch.Generator().manual_seed(3))
    found = by_rank(layer, logits_TN, 4).tolist()
    assert found == [slow_order(layer, row)[:4] for row in logits_TN]
    by_logit = logits_TN.argsort(dim=-1, descending=True)[:, :4].tolist()
    if layer.num_groups > 1:
        assert found != by_logit, "order of the logits alone would leave the groups"
        assert all(len({e // 4 for e in row}) == 1 for row in found)
    else:
        assert found == by_logit


def test_the_weak_routing_has_the_experts_of_its_ranks_and_the_tokens_sum(world):
    model, layers = world
    strong, weak = [], []
    with torch.no_grad():
        with watched(layers[:1], strong.append):
            model(IDS)
        with changed(layers, weak_routing((3, 2))), watched(layers[:1], weak.append):
            model(IDS)
    one, other = strong[0].triple, weak[0].triple
    for t in range(len(one.selected_experts)):
        order = slow_order(layers[0], one.router_logits[t])
        assert set(one.selected_experts[t].tolist()) == set(order[:2])
        assert other.selected_experts[t].tolist() == order[1:3]
    torch.testing.assert_close(other.routing_weights.sum(-1), one.routing_weights.sum(-1))
    z = one.router_logits.gather(1, other.selected_experts)
    score = z.sigmoid() if layers[0].num_groups > 1 else z.exp()
    ratio = other.routing_weights[:, 0] / other.routing_weights[:, 1]
    torch.testing.assert_close(ratio, score[:, 0] / score[:, 1], rtol=1e-4, atol=1e-6)


def test_one_rank_alone_carries_all_the_weight():
    model = tiny("Mixtral")
    layers, seen = open_layers(model), []
    with torch.no_grad(), changed(layers, weak_routing((2,))), watched(layers, seen.append):
        model(IDS)
    for one in seen:
        assert one.triple.routing_weights.shape == (21, 1)
        torch.testing.assert_close(one.triple.routing_weights, torch.ones(21, 1))


# decoding


def test_no_contrast_is_greedy_decoding(world):
    model, _ = world
    expected = greedy(model, IDS)
    for config in (Config(beta=0.0), Config(beta=3.0, ranks=(1, 2)), Config(alpha=1.0, beta=3.0)):
        assert torch.equal(generate(model, IDS, config, max_new_tokens=NEW), expected), config


def test_two_caches_give_what_whole_passes_give(world):
    model, layers = world
    config, differs = Config(beta=20.0, alpha=0.01, ranks=(3, 4)), 0
    found = generate(model, IDS, config, max_new_tokens=NEW)
    for b in range(len(IDS)):
        slow = slow_generate(model, layers, IDS[b : b + 1], config)[0]
        assert torch.equal(found[b, : len(slow)], slow)
        differs += not torch.equal(slow, greedy(model, IDS[b : b + 1])[0])
    assert differs, "the contrast should change something"


def test_one_cache_for_both_passes_would_give_something_else(world):
    """The shortcut: the weak pass reads keys and values of the strong one."""
    model, layers = world
    config = Config(beta=2.0, alpha=0.01, ranks=(2, 3))
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        new = out.logits[:, -1:].argmax(-1)
        with changed(layers, weak_routing(config.ranks)):
            shared = model(new, past_key_values=out.past_key_values).logits[:, -1]
            own = model(torch.cat((IDS, new), 1), use_cache=False).logits[:, -1]
    assert not torch.allclose(shared, own, atol=1e-3)


def test_padding_before_the_prompt_changes_nothing(world):
    model, _ = world
    config = Config(beta=2.0, alpha=0.01)
    alone = generate(model, IDS[:1, 3:], config, max_new_tokens=NEW)
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[0, :3], mask[0, :3] = 0, 0
    found = generate(model, padded, config, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(found[0, 3 : 3 + alone.shape[1]], alone[0])
    with pytest.raises(UsageError, match="padding stands behind the prompt"):
        generate(model, padded, config, attention_mask=mask.flip(1), max_new_tokens=NEW)


def test_samples_come_from_the_contrast_and_never_from_barred_tokens(world):
    model, layers = world
    config, ids = Config(beta=1.0, alpha=0.3, temperature=1.0), IDS[:1].repeat(400, 1)
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(7)
    drawn = generate(model, ids, config, max_new_tokens=1, generator=g)[:, -1]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        strong = model(IDS[:1]).logits[0, -1]
        with changed(layers, weak_routing(config.ranks)):
            weak = model(IDS[:1]).logits[0, -1]
    probs = contrast(strong, weak, 0.3, 1.0).softmax(-1)
    allowed = strong.softmax(-1) >= 0.3 * strong.softmax(-1).max() * (1 - 1e-5)
    assert allowed[drawn].all()
    shares = torch.bincount(drawn, minlength=97) / 400
    assert (shares - probs).abs().max() < 4 * 0.5 / 400**0.5, "four standard errors of a share"
    again = generate(model, ids, config, max_new_tokens=1, generator=torch.Generator().manual_seed(7))[:, -1]
    assert torch.equal(drawn, again)


def test_a_row_that_ended_goes_on_with_padding():
    model = tiny("Mixtral")
    first = int(generate(model, IDS[:1], Config(), max_new_tokens=1)[0, -1])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [first, 96], 0
    found = generate(model, IDS, Config(), max_new_tokens=4)
    assert found[0, 7:].tolist() == [first, *[0] * (found.shape[1] - 8)]
    assert generate(model, IDS[:1], Config(), max_new_tokens=4).shape == (1, 8)


def test_wrong_uses_say_what_was_expected():
    model = tiny("DeepSeek-V3")
    with pytest.raises(UsageError, match=r"no expert of rank 5\n  expected: at most 4"):
        generate(model, IDS, Config(ranks=(5,)), max_new_tokens=1)
    with pytest.raises(UsageError, match="sampling needs a generator"):
        generate(model, IDS, Config(temperature=0.5), max_new_tokens=1)
    with pytest.raises(UsageError, match="chooses 2 experts and no other number"):
        generate(tiny("PhiMoE"), IDS, Config(), max_new_tokens=1)
    for values, message in (
        ({"ranks": (0,)}, "ranks: expected different ranks from 1 on"),
        ({"ranks": ()}, "ranks: expected"),
        ({"alpha": 0.0}, "alpha: expected above 0"),
        ({"beta": -1.0}, "beta: expected at least 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**values)
