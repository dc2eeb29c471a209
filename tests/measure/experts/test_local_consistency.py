# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from anabranch.errors import UsageError
from anabranch.measure.experts.local_consistency import sch, srp
from anabranch.measure.experts.trace import Recorder, RoutingTrace
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers


def trace_of(documents, num_experts=8):
    """From (T, L, K) each."""
    selected = torch.cat([torch.as_tensor(document) for document in documents]).to(torch.int16)
    index = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor([len(d) for d in documents]))
    return RoutingTrace(selected, index, num_experts, tuple(f"layer {i}" for i in range(selected.shape[1])))


def drawn(lengths, L=2, K=2, N=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(T, L, N, generator=generator).topk(K).indices for T in lengths]


def blocks(size, T, N=4, seed=0):
    """One of N experts for a whole block of tokens: each is used at rate 1 / N."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(N, generator=generator) for _ in range(T // size // N)])
    return order.repeat_interleave(size)[:, None, None]


# SRP


def slow_windows(documents, window, layer, expert):
    counts = []
    for document in documents:
        for start in range(len(document) - window + 1):
            tokens = document[start : start + window, layer]
            counts.append(sum(int(expert in token) for token in tokens))
    return counts


def slow_srp(counts, window):
    best = (0.0, None)
    for a in range(1, window + 1):
        predicted = [f for f in counts if f >= a]
        f1 = 2 * sum(predicted) / (window * len(predicted) + sum(counts))
        if f1 > best[0]:
            best = (f1, window * len(predicted) / sum(counts))
    return best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9999))
def test_srp_is_its_slow_loop(lengths, window, K, seed):
    documents = drawn(lengths, K=K, seed=seed)
    if max(lengths) < window:
        with pytest.raises(UsageError, match="no document is as long as a window"):
            srp(trace_of(documents, 6), window, num_resamples=2)
        return
    got = srp(trace_of(documents, 6), window, num_resamples=2)
    counts = {(i, e): slow_windows(documents, window, i, e) for i in range(2) for e in range(6)}
    everything = [count for own in counts.values() for count in own]
    expected, rho = slow_srp(everything, window)
    assert got.overall == pytest.approx(expected)
    assert got.cache_factor == pytest.approx(rho)
    assert got.skipped == sum(length < window for length in lengths)
    for i in range(2):
        own = [count for e in range(6) for count in counts[i, e]]
        assert float(got.by_layer[i]) == pytest.approx(slow_srp(own, window)[0])
        for e in range(6):
            if sum(counts[i, e]):
                assert float(got.by_expert[i, e]) == pytest.approx(slow_srp(counts[i, e], window)[0])
            else:
                assert got.by_expert[i, e].isnan()


def test_constant_routing_is_one_in_both():
    documents = [torch.tensor([[[0, 3], [1, 2]]]).expand(30, -1, -1), torch.tensor([[[5, 4], [1, 7]]]).expand(20, 2, 2)]
    for got in (srp(trace_of(documents)), sch(trace_of(documents), cache_factor=1.0)):
        assert (got.overall, got.low, got.high) == (1, 1, 1)
        assert (got.by_layer == 1).all()
    assert srp(trace_of(documents)).cache_factor == 1


def test_a_window_of_one_token_is_always_right():
    assert srp(trace_of(drawn([9, 5])), 1).overall == 1


def test_blocks_against_the_same_tokens_shuffled():
    """Blocks of 64 tokens at a rate of a quarter, windows of 16: .94; the same choices without their order: .45."""
    routed = blocks(64, 8192)
    shuffled = routed[torch.randperm(len(routed), generator=torch.Generator().manual_seed(0))]
    kept, lost = srp(trace_of([routed], 4)), srp(trace_of([shuffled], 4))
    assert torch.equal(routed.flatten().bincount(), shuffled.flatten().bincount())
    assert kept.overall == pytest.approx(0.94, abs=0.005)
    assert lost.overall == pytest.approx(0.45, abs=0.01)
    f = range(17)
    independent = [binom.pmf(i, 16, 0.25) for i in f]
    best = max(
        2 * sum(i * independent[i] for i in f[a:]) / (16 * sum(independent[a:]) + 4) for a in range(1, 17)
    )  # what draws without memory give
    assert lost.overall == pytest.approx(best, abs=0.01)


def test_no_window_runs_from_one_document_into_the_next():
    documents = [torch.full((16, 1, 1), e) for e in (0, 1, 0, 2)]
    assert srp(trace_of(documents), 16).overall == 1
    joined = trace_of([torch.cat(documents)])  # the variant that forgets the borders
    assert srp(joined, 16).overall < 0.8


def test_the_names_of_experts_do_not_matter():
    documents, order = drawn([20, 30], N=8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    renamed = [order[document] for document in documents]
    before, after = srp(trace_of(documents), 4), srp(trace_of(renamed), 4)
    assert before.overall == after.overall
    assert torch.equal(before.by_expert, after.by_expert[:, order])


# SCH


def slow_sch(documents, layer, size, window, K):
    hits, choices = 0, 0
    for document in documents:
        cache, last = [], {}
        for t in range(len(document)):
            needed = document[t, layer].tolist()
            if t:
                hits += sum(e in cache for e in needed)
                choices += K
            for e in needed:
                last[e] = t
            for e in needed:
                if e in cache:
                    continue
                if len(cache) == size:
                    future = [token.tolist() for token in document[t + 1 : t + 1 + window, layer]]
                    spare = [c for c in cache if c not in needed]
                    spare.sort(key=lambda c: (sum(c in token for token in future), last[c], -c))
                    cache.remove(spare[0])
                cache.append(e)
    return hits, choices


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 15), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 3),
       st.sampled_from([1.0, 1.5, 2.0]), st.integers(0, 9999))  # fmt: skip
def test_sch_is_its_slow_loop(lengths, window, K, factor, seed):
    documents = drawn(lengths, K=K, seed=seed)
    got = sch(trace_of(documents, 6), window, factor, num_resamples=2)
    for i in range(2):
        hits, choices = slow_sch(documents, i, round(factor * K), window, K)
        assert float(got.by_layer[i]) == pytest.approx(hits / choices)
    assert got.overall == pytest.approx(float(got.by_layer.mean()))


def test_a_cache_by_hand():
    """Room for two of three experts 0 1 2 0 1 2: at the 2, the 1 is farther away and goes; then 0 hits."""
    routed = torch.tensor([0, 1, 2, 0, 1, 2])[:, None, None]
    assert sch(trace_of([routed]), window=1, cache_factor=2).overall == pytest.approx(2 / 5)
    all_fit = sch(trace_of([routed]), window=1, cache_factor=3)
    assert all_fit.overall == pytest.approx(3 / 5)


def test_more_room_or_more_order_never_hits_less():
    routed = blocks(16, 1024)
    shuffled = routed[torch.randperm(len(routed), generator=torch.Generator().manual_seed(0))]
    rates = [sch(trace_of([shuffled], 4), cache_factor=factor).overall for factor in (1, 2, 3, 4)]
    assert rates == sorted(rates)
    assert sch(trace_of([routed], 4), cache_factor=1).overall > 0.9 > rates[0]


# intervals, documents, wrong uses


def test_the_interval_comes_from_documents():
    """All of one kind: no width. Half constant, half shuffled: it spans what a draw of documents may give."""
    constant, mixed = torch.zeros(64, 1, 1, dtype=torch.long), blocks(1, 64)
    assert srp(trace_of([constant] * 8)).low == 1
    both = trace_of([constant] * 4 + [mixed] * 4)
    for measure in (srp, sch):
        got = measure(both)
        again = measure(both, generator=torch.Generator().manual_seed(0))
        assert got.low < got.overall < got.high
        assert (got.low, got.high) == (again.low, again.high)
    state = torch.get_rng_state()
    srp(both)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_of_locally_equal_tokens_is_more_consistent():
    """Repeated tokens are routed alike in the first layer; the same tokens shuffled are not."""
    model = tiny("Mixtral")
    ids = torch.randint(3, 97, (4, 4), generator=torch.Generator().manual_seed(0)).repeat_interleave(8, 1)
    other = ids[:, torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    values = []
    for batch in (ids, other):
        recorder = Recorder(mixture_layers(model))
        with recorder.recording(torch.ones_like(batch)), torch.no_grad():
            model(batch)
        values.append(srp(recorder.trace(), 4).by_layer[0])
    assert values[0] > values[1] + 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trace: srp(trace, 30), "as long as a window\n  expected: 1 to 9 tokens\n  received: 30"),
        (lambda trace: srp(trace, 0), "received: 0"),
        (lambda trace: sch(trace, 0), "the cache looks ahead"),
        (lambda trace: sch(trace, 4, 0.5), "the experts of one token\n  expected: at least 2\n  received: 1"),
    ],
)
def test_wrong_uses(call, message):
    with pytest.raises(UsageError, match=message):
        call(trace_of(drawn([9, 5])))
