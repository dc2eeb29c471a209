# SPDX-License-Identifier: Apache-2.0
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.local_consistency import sch
from anabranch.measure.experts.trace import Recorder, RoutingTrace
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.serve.eviction import Past, belady, by_frequency, drawn, lfu, lru, window
from anabranch.reuse.serve.expert_cache import CacheReport, Machine, requests, simulate

BOOK = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


def trace_of(selected, num_experts, documents=None):
    """(T, L, K) written down or drawn."""
    selected = torch.as_tensor(selected)
    documents = torch.zeros(len(selected), dtype=torch.int64) if documents is None else torch.tensor(documents)
    layers = tuple(f"layers.{layer}" for layer in range(selected.shape[1]))
    return RoutingTrace(selected.to(torch.int16), documents, num_experts, layers)


def one_by_one(experts, num_experts=8):
    return trace_of([[[expert]] for expert in experts], num_experts)


def drawn_trace(seed, tokens=40, layers=2, num_experts=6, top_k=2):
    """Three documents; every fourth trace repeats itself, every other one leans to some experts."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.ones(num_experts) if seed % 2 else 1.0 / torch.arange(1, num_experts + 1)
    rows = torch.multinomial(weights.expand(tokens * layers, -1), top_k, generator=g)
    if seed % 4 == 0:
        rows[layers * 8 :] = rows[: layers * 8].repeat(tokens // 8, 1)[: len(rows) - layers * 8]
    documents = sorted(torch.randint(3, (tokens,), generator=g).tolist())
    return trace_of(rows.view(tokens, layers, top_k), num_experts, documents)


class Fifo(Past):
    """The longest in the cache goes: known for its anomaly. Told from outside what is loaded."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity, self.queue = capacity, []

    def see(self, step, experts):
        for expert in experts:
            if expert not in self.queue:
                self.queue = [*self.queue, expert][-self.capacity :]

    def rank(self, expert, now):
        return self.queue.index(expert)


def misses(experts, capacity, rule):
    (missed,) = simulate(one_by_one(experts), capacity, rule).misses
    return missed


def test_textbook_sequences():
    assert [misses(BOOK, 3, rule) for rule in (lru, belady)] == [12, 9]
    assert [misses(ANOMALY, 3, rule) for rule in (lru, belady)] == [10, 7]
    assert [misses(ANOMALY, 4, rule) for rule in (lru, belady)] == [8, 6]
    # a a b c a b with two slots: LFU keeps a, LRU drops it for c
    assert [misses([0, 0, 1, 2, 0, 1], 2, rule) for rule in (lfu, lru)] == [4, 5]
    # one slot is free to choose: the other trace says that 2 is common, 0 and 1 are not
    common = by_frequency(one_by_one([2, 2, 2, 0, 1]))
    assert misses([2, 0, 1, 2, 0, 2], 2, common) == 4  # 2 0 1 miss, 2 stays, 0 misses, 2 stays


def test_more_room_can_hurt_fifo_but_never_lru():
    """The first line shows that the simulator can see an anomaly."""
    assert [misses(ANOMALY, c, lambda layer, asked, c=c: Fifo(c)) for c in (3, 4)] == [9, 10]
    for seed in range(200):
        trace = drawn_trace(seed)
        rates = [simulate(trace, capacity, lru).hit_rate for capacity in range(2, 7)]
        assert rates == sorted(rates), seed


def test_no_rule_loads_less_than_belady_on_a_thousand_traces():
    for seed in range(1000):
        trace, capacity, g = drawn_trace(seed, tokens=16, layers=1), 2 + seed % 4, torch.Generator().manual_seed(seed)
        bound = simulate(trace, capacity, belady).loads
        rules = (lru, lfu, window(3), by_frequency(drawn_trace(seed + 1, layers=1)), drawn(g))
        assert bound <= min(simulate(trace, capacity, rule).loads for rule in rules), seed


def fewest_loads(asked, capacity):
    """Every choice tried: what a cache can hold after each step, and the fewest loads that lead there."""
    best = {frozenset(): 0}
    for needed in asked:
        after = {}
        for held, loads in best.items():
            found = [held | set(needed)]
            while found:
                state = found.pop()
                if len(state) > capacity:
                    found += [state - {expert} for expert in state - set(needed)]
                else:
                    cost = loads + len(set(needed) - held)
                    after[state] = min(cost, after.get(state, cost))
        best = after
    return min(best.values())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_belady_is_the_optimum_of_all_choices(seed, capacity):
    trace = drawn_trace(seed, tokens=12, layers=1, num_experts=5)
    assert simulate(trace, capacity, belady).loads == fewest_loads(requests(trace).experts[0], capacity)


def slow_hits(asked, capacity, by_count):
    """Of every step; the last use is looked up in what has run, of experts of one step the higher index is kept."""
    held, past, hits = set(), [], []
    for needed in asked:
        hits.append(len(held & set(needed)))
        missing = [expert for expert in needed if expert not in held]
        while len(held) + len(missing) > capacity:

            def worth(expert):
                last = max(step for step, experts in enumerate(past) if expert in experts)
                return (sum(expert in experts for experts in past) if by_count else 0, last, expert)

            held.remove(min(held - set(needed), key=worth))
        held |= set(needed)
        past.append(needed)
    return hits


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 39), st.booleans())
def test_lru_and_lfu_are_those_of_slow_loops_and_do_not_see_the_future(seed, capacity, cut, by_count):
    trace, rule = drawn_trace(seed), lfu if by_count else lru
    slow = [slow_hits(asked, capacity, by_count) for asked in requests(trace).experts]
    assert simulate(trace, capacity, rule).hits == tuple(sum(hits) for hits in slow)
    head = trace_of(trace.selected[:cut], 6, trace.documents[:cut].tolist())
    assert simulate(head, capacity, rule).hits == tuple(sum(hits[:cut]) for hits in slow)


@pytest.mark.parametrize("rule", [lru, lfu, belady, window(2)])
def test_room_for_all_experts_leaves_the_first_loads_only(rule):
    trace = drawn_trace(3)
    distinct = tuple(len(trace.selected[:, layer].unique()) for layer in range(2))
    report = simulate(trace, 6, rule)
    assert report.misses == distinct
    assert sum(report.hits) + sum(report.misses) == 40 * 2 * 2


def test_a_window_counts_uses_where_belady_looks_for_the_next():
    """When 2 comes, 0 is needed three times more but late, 1 once and at once."""
    asked = [0, 1, 2, 1, 2, 0, 0, 0]
    assert misses(asked, 2, window(8)) == 5  # holds on to 0: 0 1 2 1 2 are loaded
    assert misses(asked, 2, window(1)) == 4  # sees the 1 alone: 0 1 2, then 0 again
    assert misses(asked, 2, belady) == 4


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9))
def test_a_window_is_the_cache_of_local_consistency(seed, capacity, reach):
    """In one document, whose first token is left out there; one expert a token, so that no two are equally old."""
    trace = drawn_trace(seed, tokens=30, top_k=1)
    trace = trace_of(trace.selected, 6)
    hits = sch(trace, reach, capacity, num_resamples=2, generator=torch.Generator().manual_seed(0)).by_layer * 29
    assert simulate(trace, capacity, window(reach)).hits == pytest.approx(hits.tolist())


def test_steps_hold_their_tokens_together_and_end_with_the_document():
    trace = trace_of([[[0, 1]], [[1, 2]], [[3, 0]], [[4, 5]], [[5, 4]]], 6, [0, 0, 0, 1, 1])
    found = requests(trace, tokens_per_step=2)
    assert found.experts == [[(0, 1, 2), (0, 3), (4, 5)]]
    assert found.documents == [0, 0, 1]
    report = simulate(trace, 3, lru, tokens_per_step=2)
    assert (report.hits, report.misses) == ((1,), (6,))
    assert report.loads_per_token == pytest.approx(6 / 5)


def test_modelled_seconds_by_hand():
    machine = Machine(expert_bytes=100, bandwidth=50, compute=3)  # a load takes 2 seconds
    report = CacheReport(4, 5, hits=(6,), misses=(4,), prefetched={0: 3, 1: 1, 2: 1})
    assert report.hit_rate == pytest.approx(0.6)
    assert report.loads == 4 + 1 + 2
    assert report.bytes(machine) == 700
    assert report.seconds(machine) == 5 * 3 + 4 * 2 + 0 + 1  # two loads ahead take 4 seconds, 3 of them hidden


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_a_model_that_always_chooses_the_same_experts_loads_them_once(family):
    """Planted: routers of zeros, which give every token the same two; the control are the routers as drawn."""
    found = {}
    for planted in (True, False):
        model = tiny(family)
        layers = open_layers(model)
        for layer in layers if planted else ():
            torch.nn.init.zeros_(layer.router.weight)
        ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
        recorder = Recorder(layers)
        with torch.no_grad(), recorder.recording(torch.ones_like(ids)):
            model(ids)
        found[planted] = simulate(recorder.trace(), 2, lru)
    assert set(found[True].misses) == {2}
    assert found[True].hit_rate > 0.95
    assert found[False].hit_rate < 0.6


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match=r"(?s)what one step of a layer needs.*expected: at least 2.*received: 1"):
        simulate(drawn_trace(1), 1, lru)
    with pytest.raises(UsageError, match=r"(?s)bandwidth of the machine.*above 0"):
        Machine(expert_bytes=1, bandwidth=0, compute=1)
    with pytest.raises(UsageError, match="trace is empty"):
        simulate(trace_of(torch.zeros(0, 1, 2), 4, []), 2, lru)
    with pytest.raises(UsageError, match="at least one step"):
        window(0)


def test_nothing_touches_the_generators_of_others():
    state, python = torch.get_rng_state(), random.getstate()
    simulate(drawn_trace(0), 3, drawn(torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
