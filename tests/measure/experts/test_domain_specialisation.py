# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from anabranch.errors import UsageError
from anabranch.measure.experts.domain_specialisation import (
    co_activation,
    divergence,
    information,
    interval,
    load,
    load_entropy,
    overlap,
    specialisation,
)
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers


def stats_of(counts_DFLN, top_k=1):
    counts = torch.as_tensor(counts_DFLN, dtype=torch.float64)
    D, F, L, N = counts.shape
    stats = ExpertStats(tuple("abcdef"[:D]), tuple(f"layer {i}" for i in range(L)), N, top_k, F)
    stats.sums["count"] = counts
    stats.tokens = counts[:, :, 0].sum(-1) / top_k
    stats.pairs = torch.diag_embed(counts.sum(1))
    return stats


def disjoint(D=2, F=4, N=8, tokens=50):
    """Label d uses experts of its own, all alike."""
    counts = torch.zeros(D, F, 1, N)
    for d in range(D):
        own = slice(d * (N // D), (d + 1) * (N // D))
        counts[d, :, :, own] = tokens
    return stats_of(counts)


def independent(seed, D=4, F=10, N=8, tokens=50):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(N, (D, F, tokens), generator=generator)
    return stats_of(torch.nn.functional.one_hot(chosen, N).sum(2)[:, :, None])


def test_disjoint_routing_by_hand():
    stats = disjoint()
    got = information(stats, num_permutations=200)
    assert divergence(stats)[0, 1] == pytest.approx(math.log(2))
    assert divergence(stats)[0, 0] == pytest.approx(0, abs=1e-12)
    assert got.plug_in == pytest.approx(math.log(2))
    assert got.normalised == pytest.approx(1, abs=0.01)
    assert got.p_value <= 0.05
    assert (specialisation(stats) == 1).all()
    assert load_entropy(stats) == pytest.approx(torch.full((2, 1), math.log(4) / math.log(8)))
    assert torch.equal(overlap(stats, 4)[:, :, 0], torch.eye(2))


def test_equal_loads_by_hand():
    stats = stats_of(torch.tensor([[[[1, 2, 1]]], [[[10, 20, 10]]]]))
    assert torch.equal(load(stats)[:, 0], torch.tensor([[0.25, 0.5, 0.25]] * 2).double())
    assert torch.allclose(specialisation(stats), torch.full((1, 3), 0.5).double())
    assert divergence(stats).abs().max() == pytest.approx(0, abs=1e-12)
    assert information(stats, num_permutations=5).plug_in == pytest.approx(0, abs=1e-12)
    assert (overlap(stats, 2) == 1).all()


def test_every_measure_is_its_slow_loop():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (3, 2, 2, 5), generator=generator)
    stats = stats_of(counts)
    got = information(stats, num_permutations=3)
    for i in range(2):
        table = counts[:, :, i].sum(1).tolist()
        f = [[c / sum(row) for c in row] for row in table]
        for e in range(5):
            column = [f[d][e] for d in range(3)]
            assert float(specialisation(stats)[i, e]) == pytest.approx(max(column) / sum(column))
        for d in range(3):
            assert float(load_entropy(stats)[d, i]) == pytest.approx(-sum(p * math.log(p) for p in f[d]) / math.log(5))
            for other in range(3):
                js = 0
                for p, q in zip(f[d], f[other], strict=True):
                    js += p / 2 * math.log(2 * p / (p + q)) + q / 2 * math.log(2 * q / (p + q))
                assert float(divergence(stats)[d, other, i]) == pytest.approx(js, abs=1e-9)
                top = [set(sorted(range(5), key=lambda e, row=row: (-row[e], e))[:2]) for row in (f[d], f[other])]
                jaccard = len(top[0] & top[1]) / len(top[0] | top[1])
                assert float(overlap(stats, 2)[d, other, i]) == pytest.approx(jaccard)
        labels = [d for d in range(3) for e in range(5) for _ in range(table[d][e])]
        experts = [e for d in range(3) for e in range(5) for _ in range(table[d][e])]
        mutual = mutual_info_score(labels, experts)
        assert float(got.plug_in[i]) == pytest.approx(mutual)
        assert float(got.corrected[i]) == pytest.approx(mutual - 2 * 4 / (2 * len(labels)))
        shares = [labels.count(d) / len(labels) for d in range(3)]
        entropy = -sum(p * math.log(p) for p in shares)
        assert float(got.normalised[i]) == pytest.approx(float(got.corrected[i]) / entropy)


def test_the_plug_in_value_is_biased_and_the_corrected_is_not():
    """4 labels, 8 experts, 2,000 tokens: about 3 * 7 / 4000 = .00525 where there is nothing."""
    values = [information(independent(seed), num_permutations=1) for seed in range(60)]
    plug_in = torch.stack([value.plug_in for value in values]).mean().item()
    corrected = torch.stack([value.corrected for value in values]).mean().item()
    assert plug_in == pytest.approx(0.00525, rel=0.1)
    assert abs(corrected) < 0.0005


def test_independent_routing_stays_within_its_null():
    """p-values of nothing are spread evenly: few are small. The planted one is."""
    values = [information(independent(seed), num_permutations=60) for seed in range(60)]
    p = torch.cat([value.p_value for value in values])
    assert (p < 0.1).double().mean() < 0.25
    assert 0.35 < p.mean() < 0.65
    null = torch.cat([value.null.mean(0) for value in values])
    assert null.mean() == pytest.approx(0.00525, rel=0.1)
    planted = stats_of(independent(0)["count"].clone())
    planted.sums["count"][0, :, :, 3] += 10
    assert information(planted, num_permutations=200).p_value == pytest.approx(1 / 201)


def test_documents_that_hold_together_are_no_evidence():
    """Every fold has its favourite expert, whatever its label: tokens look dependent, folds don't."""
    p = []
    for seed in range(30):
        favourite = torch.randint(8, (4, 10), generator=torch.Generator().manual_seed(seed))
        stats = stats_of(50 * torch.nn.functional.one_hot(favourite, 8)[:, :, None])
        got = information(stats, num_permutations=60)
        assert got.corrected > 0.1  # the correction for independent tokens alone would be fooled
        p.append(float(got.p_value))
    assert sum(value < 0.05 for value in p) <= 5


def test_co_activation_by_hand():
    stats = stats_of(torch.ones(1, 1, 1, 3), top_k=2)
    stats.pairs[0, 0] = torch.tensor([[4.0, 4, 0], [4, 8, 4], [0, 4, 4]])
    expected = torch.tensor([[1.0, 1, 0], [0.5, 1, 0.5], [0, 1, 1]])
    assert torch.equal(co_activation(stats, "a")[0], expected.double())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999), st.permutations(range(6)), st.integers(1, 5))
def test_names_of_experts_do_not_matter(seed, order, factor):
    counts = torch.randint(0, 9, (3, 2, 2, 6), generator=torch.Generator().manual_seed(seed))
    counts[..., 0] += 1
    stats, renamed = stats_of(counts), stats_of(counts[..., order] * factor)
    assert torch.allclose(divergence(stats), divergence(renamed))
    assert torch.allclose(load_entropy(stats), load_entropy(renamed))
    assert torch.allclose(specialisation(stats)[:, order], specialisation(renamed), equal_nan=True)
    assert torch.allclose(
        information(stats, num_permutations=1).plug_in, information(renamed, num_permutations=1).plug_in
    )
    assert (divergence(stats) <= math.log(2) + 1e-12).all()


def test_intervals_from_documents_hold_the_value_and_shrink():
    few, many = (independent(1, tokens=tokens) for tokens in (20, 2000))
    widths = []
    for stats in (few, many):
        low, high = interval(stats, lambda drawn: load(drawn), num_resamples=200)
        assert ((low <= load(stats)) & (load(stats) <= high)).double().mean() > 0.9
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 5


def collected(model, parts):
    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    labels, folds = (torch.arange(8) % 2)[:, None], torch.arange(8) // 2
    collector = Collector(model, mixture_layers(model), ["a", "b"], num_folds=4)
    for rows in parts:
        with collector.collecting(labels[rows], folds[rows], torch.ones(len(ids[rows]), 12)), torch.no_grad():
            model(ids[rows])
    return collector.stats


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3"])
def test_merged_shards_measure_exactly_what_one_pass_does(family):
    model = tiny(family)
    once = collected(model, [slice(0, 8)])
    merged = collected(model, [slice(0, 3)]).merge(collected(model, [slice(3, 8)]))
    for measure in (load, specialisation, load_entropy, divergence, lambda stats: overlap(stats, 2)):
        assert torch.equal(measure(once), measure(merged))
    assert torch.equal(information(once).p_value, information(merged).p_value)


def test_wrong_uses():
    with pytest.raises(UsageError, match=r"without tokens loads no expert[\s\S]*received: \['b'\]"):
        load(stats_of(torch.tensor([[[[1, 1]]], [[[0, 0]]]])))
    with pytest.raises(UsageError, match="no such number of experts\n  expected: 1 to 8\n  received: 9"):
        overlap(disjoint(), 9)
