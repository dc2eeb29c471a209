# SPDX-License-Identifier: Apache-2.0
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.signatures import (
    aligned_distance,
    collaboration,
    distance,
    layer_distance,
    matching,
    specialisation,
    spectral_distance,
    verdict,
)
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.surgery import permute_experts

LABELS = ("low", "middle", "high")


def texts(seed=0, rows=18, length=24):
    """Three labels, each with a third of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    return torch.randint(0, 31, (rows, length), generator=generator) + 3 + 31 * labels[:, None], labels


def profile(model, labels=LABELS):
    ids, own = texts()
    collector = Collector(model, mixture_layers(model), labels, num_folds=2)
    with collector.collecting(own[:, None], torch.arange(len(ids)) % 2, torch.ones_like(ids)), torch.no_grad():
        model(ids)
    return collector.stats


def stats_of(selected_DTK, num_experts, labels=LABELS):
    """One layer's statistics from choices, by hand."""
    D, T, K = selected_DTK.shape
    chosen = torch.nn.functional.one_hot(selected_DTK, num_experts).sum(2).double()
    stats = ExpertStats(tuple(labels[:D]), ("layer",), num_experts, K, 1)
    stats.sums["count"] = chosen.sum(1)[:, None, None]
    stats.tokens = torch.full((D, 1), float(T)).double()
    stats.pairs = (chosen.transpose(1, 2) @ chosen)[:, None]
    return stats


def drawn(num_experts=6, seed=0, D=3, T=40, K=2):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(D, 1, num_experts, generator=generator)
    scores = torch.randn(D, T, num_experts, generator=generator) + bias
    return scores.topk(K).indices


def test_the_signature_is_its_slow_loop():
    selected = drawn()
    stats = stats_of(selected, 6)
    for e in range(6):
        for d in range(3):
            tokens = [row.tolist() for row in selected[d]]
            expected = 6 * sum(e in row for row in tokens) / (2 * len(tokens))
            assert float(specialisation(stats)[0, e, d]) == pytest.approx(expected)
        for other in range(6):
            tokens = [row.tolist() for row in selected.flatten(0, 1)]
            both = sum(e in row and other in row for row in tokens)
            either = sum(e in row or other in row for row in tokens)
            assert float(collaboration(stats)[0, e, other]) == pytest.approx(both / either)


def test_an_expert_that_nobody_uses_works_with_nobody():
    stats = stats_of(drawn(5), 6)  # the last is never chosen
    together = collaboration(stats)[0]
    assert together.isfinite().all()
    assert together[5].sum() == together[:, 5].sum() == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 5))
def test_the_matching_is_the_best_of_all_orders(seed, N):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, N, 3, generator=generator).double()
    nothing = torch.zeros(N, N).double()
    pairs = matching(one, other, nothing, nothing)
    cost = sum(float((one[i] - other[j]).abs().sum()) for i, j in pairs)
    best = min(
        sum(float((one[i] - other[j]).abs().sum()) for i, j in enumerate(order))
        for order in itertools.permutations(range(N))
    )
    assert cost == pytest.approx(best)
    assert layer_distance(one, other, nothing, nothing).specialisation == pytest.approx(best / (N * 3) / 2)


def test_matching_by_hand_with_unequal_numbers():
    """One expert that does everything against two that share: half of its mass goes to each."""
    one, two = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    together, others = torch.eye(1), torch.eye(2)
    assert sorted(matching(one, two, together, others)) == [(0, 0), (0, 1)]
    got = layer_distance(one, two, together, others)
    assert got.specialisation == pytest.approx(0.5)  # |1 - 2| and |1 - 0|, halved
    assert got.collaboration == pytest.approx(0.5)  # spectra 1 against 1/2 and 1/2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 9999), st.sampled_from([4, 6]))
def test_nothing_to_itself_and_blind_to_the_order(seed, other_seed, M):
    one, selected = stats_of(drawn(6, seed), 6), drawn(M, other_seed)
    other, order = stats_of(selected, M), torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    renamed = stats_of(order[selected], M)
    assert distance(one, one).total == 0
    assert distance(other, renamed).total == pytest.approx(0, abs=1e-9)
    assert distance(one, other).specialisation == pytest.approx(distance(other, one).specialisation)
    assert distance(one, renamed).specialisation == pytest.approx(distance(one, other).specialisation)


@pytest.mark.parametrize("family", ["Mixtral", "OLMoE"])
def test_a_copy_with_its_experts_in_another_order_has_distance_zero(family):
    model = tiny(family)
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for layer in mixture_layers(other):
        permute_experts(layer, torch.randperm(8, generator=generator).tolist())
    assert distance(profile(model), profile(other)).total == pytest.approx(0, abs=1e-9)
    assert not torch.equal(profile(model)["count"], profile(other)["count"])


def test_collaboration_tells_apart_experts_that_specialise_alike():
    """Four experts of equal load that work in two pairs: the pairs are other ones in the copy."""
    pairs = torch.tensor([[[0, 1], [2, 3]]])
    renamed = torch.tensor([[[0, 2], [1, 3]]])
    third = torch.tensor([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    assert distance(stats_of(pairs, 4), stats_of(pairs, 4)).total == 0
    got = distance(stats_of(pairs, 4), stats_of(third, 4))
    assert got.specialisation == 0
    assert got.collaboration > 0
    assert spectral_distance(*(collaboration(stats_of(s, 4))[0] for s in (pairs, renamed))) == pytest.approx(
        0, abs=1e-9
    )


def trained(model, steps=15, seed=1):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        ids, _ = texts(seed + step, rows=6)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def world():
    """A teacher, a copy of it that was trained on, and five models of other seeds."""
    teacher = tiny("Mixtral")
    return profile(teacher), profile(trained(teacher)), [profile(tiny("Mixtral", seed=seed)) for seed in range(1, 20)]


def test_continued_training_is_nearer_than_another_seed(world):
    teacher, student, unrelated = world
    got = verdict(student, teacher, unrelated)
    assert 0 < got.distance < min(got.null)
    assert got.p_value == pytest.approx(1 / 20)
    assert got.null == tuple(distance(student, other).total for other in unrelated)


def test_an_unrelated_model_is_no_student(world):
    """The control: p-values of models that learnt from nobody are not small."""
    teacher, _, unrelated = world
    p = [verdict(unrelated[i], teacher, unrelated[:i] + unrelated[i + 1 :]).p_value for i in range(19)]
    assert sum(value <= 0.1 for value in p) <= 5
    assert 0.25 < sum(p) / len(p) < 0.75


def test_swapped_labels_on_one_side_raise_the_distance(world):
    teacher, student, _ = world
    swapped = copy.deepcopy(student)
    order = torch.tensor([1, 0, 2])
    swapped.sums = {name: value[order] for name, value in student.sums.items()}
    swapped.tokens, swapped.pairs = student.tokens[order], student.pairs[order]
    assert distance(swapped, teacher).specialisation > distance(student, teacher).specialisation + 0.05


def test_other_depths_and_numbers_of_experts_compare():
    """A model against itself with every layer twice is the same at every depth; a smaller one is not."""
    stats = profile(tiny("Mixtral"))
    twice = copy.deepcopy(stats)
    twice.layers = tuple(f"{name} {copy_}" for name in stats.layers for copy_ in (0, 1))
    twice.sums = {name: value.repeat_interleave(2, 2) for name, value in stats.sums.items()}
    twice.pairs = stats.pairs.repeat_interleave(2, 1)
    assert distance(stats, twice).total == 0
    fewer = profile(tiny("Mixtral", num_local_experts=6, num_hidden_layers=2))
    assert 0 < distance(stats, fewer).total < 1


def test_experts_that_keep_their_numbers_are_compared_as_they_are():
    one, order = stats_of(drawn(), 6), torch.tensor([1, 0, 2, 3, 4, 5])
    renamed = stats_of(order[drawn()], 6)
    assert aligned_distance(one, one).total == 0
    got = aligned_distance(one, renamed)
    P, C = specialisation(one)[0], collaboration(one)[0]
    slow = sum(abs(float(P[e, d] - P[order[e], d])) for e in range(6) for d in range(3)) / (6 * 3) / 2
    pairs = list(itertools.combinations(range(6), 2))
    slow_pairs = sum(abs(float(C[i, j] - C[order[i], order[j]])) for i, j in pairs) / len(pairs)
    assert got.specialisation == pytest.approx(slow)
    assert got.collaboration == pytest.approx(slow_pairs)
    with pytest.raises(UsageError, match="did not start from the same weights"):
        aligned_distance(one, stats_of(drawn(4), 4))


def test_wrong_uses(world):
    teacher, student, _ = world
    with pytest.raises(UsageError, match="a distance alone says nothing"):
        verdict(student, teacher, [])
    other = profile(tiny("Mixtral"), labels=("a", "b", "c"))
    with pytest.raises(UsageError, match=r"compared label by label[\s\S]*profile both models on the same texts"):
        distance(teacher, other)
