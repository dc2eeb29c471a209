# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import Recorder, RoutingTrace
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.serve.eviction import belady, lru
from anabranch.reuse.serve.expert_cache import simulate
from anabranch.reuse.serve.expert_flow import (
    Ahead,
    Config,
    PathPredictor,
    by_need,
    experts_needed,
    fit,
    hamming,
    paths,
    predicted,
    recall,
    schedule,
)

VOCAB, L, N, K = 20, 2, 8, 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def trace_of(selected, documents, num_experts=N):
    layers = tuple(f"layers.{layer}" for layer in range(selected.shape[1]))
    return RoutingTrace(selected.to(torch.int16), torch.as_tensor(documents), num_experts, layers)


def draws(seed, tokens=60):
    """Independent draws: no history tells anything."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(torch.ones(tokens * L, N), K, generator=g)
    return trace_of(rows.view(tokens, L, K), [0] * tokens)


def local(seed, tokens=120):
    """What ran last is the likeliest to run next: the depth in a stack of last uses falls off geometrically."""
    g = torch.Generator().manual_seed(seed)
    depths = torch.multinomial(0.6 ** torch.arange(float(N)).expand(tokens * L, N), K, generator=g).tolist()
    stacks, rows = [list(range(N)) for _ in range(L)], []
    for i, depth in enumerate(depths):
        stack = stacks[i % L]
        rows.append([stack[d] for d in depth])
        stack[:] = rows[-1] + [expert for expert in stack if expert not in rows[-1]]
    return trace_of(torch.tensor(rows).view(tokens, L, K), [0] * tokens)


def behind_lru(make, predict):
    """Mean and standard error over 40 traces: hit rate of the cache by prediction minus that of LRU."""
    found = []
    for seed in range(40):
        trace = make(seed)
        guessed, plain = simulate(trace, 4, by_need(predict(trace, seed))), simulate(trace, 4, lru)
        found.append(guessed.hit_rate - plain.hit_rate)
    found = torch.tensor(found)
    return float(found.mean()), float(found.std()) / 40**0.5


def blind(trace, seed):
    """A predictor that knows nothing: draws of its own."""
    return draws(seed + 1000, len(trace.selected))


def routed_by_token(seed, documents=24, length=12):
    """Planted: experts of a token follow from its id in layer 0, from it and the id before in layer 1."""
    g = torch.Generator().manual_seed(7)
    table = torch.stack([torch.randperm(N, generator=g)[:K] for _ in range(VOCAB)])
    ids = torch.randint(VOCAB, (documents, length), generator=torch.Generator().manual_seed(seed))
    before = torch.cat((ids[:, :1], ids[:, :-1]), 1)
    selected = torch.stack((table[ids], (table[before] + 3) % N), 2)
    return ids.flatten(), trace_of(selected.flatten(0, 1), torch.arange(documents).repeat_interleave(length))


# the cache


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.booleans(), st.integers(1, 2))
def test_a_perfect_predictor_has_the_loads_of_belady_and_none_on_demand_with_ahead(seed, room, is_local, per_step):
    trace = local(seed) if is_local else draws(seed)
    capacity = max(room, K * per_step)
    options = {"tokens_per_step": per_step}
    bound = simulate(trace, capacity, belady, **options)
    perfect = simulate(trace, capacity, by_need(trace, per_step), **options)
    assert (perfect.hits, perfect.misses) == (bound.hits, bound.misses)
    ahead = simulate(trace, capacity, by_need(trace, per_step), prefetch=Ahead(trace, per_step), **options)
    assert sum(ahead.misses) == 0
    assert ahead.loads == bound.loads


def test_a_blind_predictor_is_below_lru_on_local_routing_and_within_noise_on_draws():
    mean, error = behind_lru(local, blind)
    assert mean < -5 * error
    mean, error = behind_lru(draws, blind)
    assert abs(mean) < 3 * error
    # control: the same predictions with knowledge are above LRU on both
    for make in (local, draws):
        mean, error = behind_lru(make, lambda trace, seed: trace)
        assert mean > 5 * error


def test_on_a_loop_anything_beats_lru():
    """Why the statement is one about local routing: LRU drops what comes next, and has no hit at all."""
    loop = trace_of((torch.arange(160) % N).view(160, 1, 1), [0] * 160)
    guess = trace_of(torch.randint(N, (160, 1, 1), generator=seeded(0)), [0] * 160)
    assert sum(simulate(loop, 4, lru).hits) == 0
    assert simulate(loop, 4, by_need(guess)).hit_rate > 0.1


# the predictor


def test_what_follows_from_the_ids_is_learned_and_fills_caches_better_than_lru():
    ids, trace = routed_by_token(0)
    new_ids, new = routed_by_token(1)
    predictor = PathPredictor(
        Config(vocab_size=VOCAB, num_layers=L, num_experts=N, hidden_size=48), generator=seeded(0)
    )
    untrained = recall(predicted(predictor, new_ids, new), new)
    losses = fit(predictor, ids, trace, steps=150, learning_rate=1e-2, generator=seeded(1))
    guess = predicted(predictor, new_ids, new)
    assert losses[-1] < losses[0] / 2
    assert recall(guess, new) > 0.9
    assert untrained < 0.5  # chance: 0.25
    loads = [simulate(new, 4, rule).loads for rule in (belady, by_need(guess), lru)]
    assert loads == sorted(loads)
    assert loads[1] < loads[2]
    # control: ids that have nothing to do with the routing are of no use
    other = ids[torch.randperm(len(ids), generator=seeded(2))]
    predictor = PathPredictor(predictor.config, generator=seeded(0))
    fit(predictor, other, trace, steps=150, learning_rate=1e-2, generator=seeded(1))
    assert recall(predicted(predictor, new_ids, new), new) < 0.5


def test_no_token_sees_a_later_one_and_the_loss_is_binary_cross_entropy():
    predictor = PathPredictor(Config(vocab_size=VOCAB, num_layers=L, num_experts=N), generator=seeded(0))
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9]])
    logits = predictor(ids)
    assert logits.shape == (2, 4, L, N)
    assert torch.equal(logits[0, :3], logits[1, :3])
    assert not torch.equal(logits[0, 3], logits[1, 3])
    # two documents, of three tokens and of one: padding is no target
    trace = trace_of(
        torch.stack([torch.randperm(N, generator=seeded(i))[:K] for i in range(8)]).view(4, L, K), [0, 0, 0, 1]
    )
    flat = torch.tensor([1, 2, 3, 5])
    with torch.no_grad():
        p = torch.cat([predictor(flat[None, :3])[0], predictor(flat[None, 3:])[0]]).double().sigmoid()
    total = 0.0
    for t in range(4):
        for layer in range(L):
            for e in range(N):
                chosen = e in trace.selected[t, layer].tolist()
                total -= float((p[t, layer, e] if chosen else 1 - p[t, layer, e]).log())
    (loss,) = fit(predictor, flat, trace, steps=1, batch_size=8, generator=seeded(0))
    assert loss == pytest.approx(total / (4 * L * N), rel=1e-5)


def test_drawing_a_predictor_leaves_the_generators_of_others_alone():
    state = torch.get_rng_state()
    config = Config(vocab_size=VOCAB, num_layers=L, num_experts=N)
    one, same = (PathPredictor(config, generator=seeded(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


# the scheduler


def test_distances_and_needs_by_hand():
    bits = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).double()
    assert hamming(bits, torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]).double()).tolist() == [[0, 2], [2, 2]]
    path = bits.bool().view(2, 2, 2)
    assert experts_needed(path, [torch.tensor([0]), torch.tensor([1])]) == 4
    assert experts_needed(path, [torch.tensor([0, 1])]) == 3


def test_two_planted_clusters_are_parted_and_each_group_needs_half_the_experts():
    g = seeded(0)
    kind = torch.randperm(32, generator=g) % 2
    rows = torch.stack([torch.randperm(4, generator=g)[:K] for _ in range(64)]).view(32, L, K) + 4 * kind[:, None, None]
    path = paths(trace_of(rows, [0] * 32))
    plan = schedule(path)
    assert [len(kind[group].unique()) for group in plan.groups] == [1, 1]
    assert [len(group) for group in plan.groups] == [16, 16]
    assert experts_needed(path, plan.groups) == 2 * L * 4
    assert experts_needed(path, torch.arange(32).split(16)) == 2 * L * 8


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 17))
def test_a_schedule_is_a_permutation_that_never_needs_more_experts(seed, tokens):
    trace = draws(seed, tokens)
    path = paths(trace)
    plan = schedule(path)
    assert sorted(plan.order.tolist()) == list(range(tokens))
    assert [len(group) for group in plan.groups] == [(tokens + 1) // 2, tokens // 2]
    assert experts_needed(path, plan.groups) <= experts_needed(path, torch.arange(tokens).split((tokens + 1) // 2))
    x = torch.randn(tokens, 3, generator=seeded(seed))
    assert torch.equal(x[plan.order][plan.inverse], x)


def test_decoding_in_the_new_order_with_caches_taken_along_gives_the_old_outputs():
    """And with caches left where they were it does not: the control."""
    model = tiny("Mixtral")
    ids = torch.randint(3, 97, (6, 7), generator=seeded(0))
    recorder = Recorder(open_layers(model))
    outputs = {}
    with torch.no_grad():
        with recorder.recording(torch.ones_like(ids)):
            plain = model(ids).logits[:, -1]
        plan = schedule(paths(recorder.trace())[6::7])  # by what each sequence's last token chose
        assert not torch.equal(plan.order, torch.arange(6))
        for taken in (True, False):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            if taken:
                cache.reorder_cache(plan.order)
            outputs[taken] = model(ids[plan.order, -1:], past_key_values=cache).logits[:, -1][plan.inverse]
    torch.testing.assert_close(outputs[True], plain, rtol=0, atol=1e-4)
    assert float((outputs[False] - plain).abs().max()) > 0.1


# wrong uses


def test_wrong_uses_say_what_was_expected():
    trace = draws(0)
    with pytest.raises(UsageError, match=r"(?s)prediction is of another trace.*60 steps.*received: 30"):
        simulate(trace, 4, by_need(draws(0, 30)))
    predictor = PathPredictor(Config(vocab_size=VOCAB, num_layers=L, num_experts=N), generator=seeded(0))
    with pytest.raises(UsageError, match=r"(?s)different tokens.*60 ids.*received: 5"):
        fit(predictor, torch.arange(5), trace, generator=seeded(0))
    with pytest.raises(UsageError, match="too few tokens to group"):
        schedule(paths(draws(0, 1)))
