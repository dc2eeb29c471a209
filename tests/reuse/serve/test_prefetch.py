# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.trace import RoutingTrace
from anabranch.reuse.serve.eviction import belady, lru
from anabranch.reuse.serve.expert_cache import requests, simulate
from anabranch.reuse.serve.prefetch import NearestHistory, PreviousLayer, followers, histories, most_likely


def trace_of(selected, num_experts, documents):
    layers = tuple(f"layers.{layer}" for layer in range(selected.shape[1]))
    return RoutingTrace(selected.to(torch.int16), torch.as_tensor(documents), num_experts, layers)


def two_kinds(seed, documents=6, tokens=12, layers=3):
    """Requests of kind 0 choose among experts 0 to 3, of kind 1 among 4 to 7; the kinds take turns."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    rows = pairs[torch.randint(4, (documents, tokens, layers), generator=g)]
    rows = rows + 4 * (torch.arange(documents) % 2)[:, None, None, None]
    return trace_of(rows.flatten(0, 1), 8, torch.arange(documents).repeat_interleave(tokens))


def test_histories_and_followers_by_hand():
    selected = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[3, 1], [0, 3]]])
    trace = trace_of(selected, 4, [0, 0, 1])
    assert histories(trace).tolist() == [[[2, 1, 1, 0], [0, 1, 2, 1]], [[0, 1, 0, 1], [1, 0, 0, 1]]]
    assert histories(trace, tokens_per_step=2)[0].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    # 0 was followed by 2 3 and by 2 1, 1 by 2 3 and by 0 3, 2 by 2 1, 3 by 0 3
    assert followers(trace)[0].tolist() == [[0, 1, 2, 1], [1, 0, 1, 2], [0, 1, 1, 0], [1, 0, 0, 1]]
    assert most_likely(torch.tensor([0.0, 3.0, 5.0, 3.0, 0.0]), 4) == [2, 1, 3]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.integers(1, 8))
def test_the_nearest_is_that_of_a_slow_loop_and_histories_end_with_the_request(seed, num_stored, steps):
    g = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 5, (num_stored, 2, 4), generator=g).double() + 0.01
    prefetch, counts = NearestHistory(stored, 2), [[0] * 4 for _ in range(2)]
    assert prefetch.want(0, 0, 0) == []  # nothing has run yet
    for step in range(steps):
        for layer in range(2):
            chosen = torch.randperm(4, generator=g)[:2].tolist()
            prefetch.see(0, step, layer, chosen)
            for expert in chosen:
                counts[layer][expert] += 1
    flat = [float(value) for row in counts for value in row]
    cosines = []
    for row in stored.flatten(1).tolist():
        dot = sum(a * b for a, b in zip(flat, row, strict=True))
        cosines.append(dot / math.sqrt(sum(a * a for a in flat)) / math.sqrt(sum(b * b for b in row)))
    assert cosines[prefetch.nearest()] == pytest.approx(max(cosines), rel=1e-12)
    wanted = stored[prefetch.nearest(), 1].tolist()
    assert [wanted[e] for e in prefetch.want(0, steps, 1)] == sorted(wanted, reverse=True)[:2]
    assert prefetch.want(1, 0, 0) == []  # another request


def test_planted_kinds_of_requests_are_told_apart_and_misses_fall():
    stored, trace = histories(two_kinds(0)), two_kinds(1)
    plain = simulate(trace, 4, lru)
    known = simulate(trace, 4, lru, prefetch=NearestHistory(stored, 4))
    wrong = simulate(trace, 4, lru, prefetch=NearestHistory(stored.roll(4, dims=2)[:1], 4))  # of the other kind only
    assert sum(known.misses) < sum(plain.misses) / 2
    assert sum(wrong.misses) >= sum(plain.misses)
    assert wrong.loads > plain.loads
    bound = simulate(trace, 4, belady)
    assert min(report.loads for report in (plain, known, wrong)) >= bound.loads
    # known is below Belady's rule on demand, not below it in loads: the bound is one of loads
    assert sum(known.misses) < sum(bound.misses)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(2, 6), st.integers(1, 6))
def test_no_prefetch_loads_less_than_belady(seed, capacity, width):
    g = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(torch.ones(40, 6), 2, generator=g).view(20, 2, 2)
    trace = trace_of(rows, 6, torch.arange(4).repeat_interleave(5))
    bound = simulate(trace, capacity, belady)
    asked = sum(len(needed) for layer in requests(trace).experts for needed in layer)
    for prefetch in (NearestHistory(histories(trace), width), PreviousLayer(followers(trace), width)):
        for rule in (lru, belady):
            report = simulate(trace, capacity, rule, prefetch=prefetch)
            assert report.loads >= bound.loads
            assert sum(report.hits) + sum(report.misses) == asked


def test_a_layer_that_follows_from_the_one_before_has_no_misses_after_it():
    """Planted: layer 1 chooses e + 1 where layer 0 chose e; in the control it draws its own."""
    g = torch.Generator().manual_seed(0)
    first = torch.multinomial(torch.ones(60, 8), 1, generator=g)
    found = {}
    for planted in (True, False):
        second = (first + 1) % 8 if planted else torch.multinomial(torch.ones(60, 8), 1, generator=g)
        trace = trace_of(torch.stack((first, second), 1), 8, [0] * 60)
        found[planted] = simulate(trace, 2, lru, prefetch=PreviousLayer(followers(trace), 1)).misses
    assert found[True][1] == 0
    assert found[True][0] > 20  # the first layer follows nothing
    assert found[False][1] > 20


class Wants:
    """Expert 2, before the third step only."""

    def want(self, document, step, layer):
        return [2] if step == 2 else []

    def see(self, document, step, layer, experts):
        pass


def test_what_the_step_itself_needs_is_not_given_up_for_a_prefetch():
    """0 1 0 with two slots: expert 2 comes in place of 1, which nobody needs again, and not of 0."""
    report = simulate(trace_of(torch.tensor([0, 1, 0]).view(3, 1, 1), 4, [0] * 3), 2, belady, prefetch=Wants())
    assert (report.hits, report.misses, report.loads) == ((1,), (2,), 3)
    assert report.prefetched == {0: 2, 1: 1}


def test_a_width_of_none_is_refused():
    with pytest.raises(UsageError, match=r"(?s)nothing can be prefetched.*received: 1 histories, width 0"):
        NearestHistory(torch.ones(1, 2, 4), 0)
