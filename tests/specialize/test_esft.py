# SPDX-License-Identifier: Apache-2.0
"""ESFT: which experts are chosen, that only they learn, and that they are the ones that matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import esft_token
from anabranch.measure.experts.ranking.batches import Batch, read_stats
from anabranch.models.mixtures.adapter import difference, merge
from anabranch.models.mixtures.families import tiny
from anabranch.specialize.esft import Config, select, train
from anabranch.specialize.expert_tuning import Training, tune

HAND = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)


def task(num_words=3, B=4, S=10):
    """Texts of few words, which few experts serve."""
    ids = torch.randint(10, 10 + num_words, (B, S), generator=torch.Generator().manual_seed(2))
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.zeros(B, dtype=torch.int64))


def chosen(scores, p):
    return [set(row.nonzero().flatten().tolist()) for row in select(scores, p)]


def test_by_hand():
    for p, expected in ((0.2, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (1.0, {0, 1, 2, 3})):
        assert chosen(HAND, p) == [expected]
        assert chosen(HAND * 0.37, p) == [expected], "gates of a layer need not sum to 1"
    assert chosen(torch.tensor([[0.0, 0.6, 0.0, 0.4]]), 1.0) == [{1, 3}]


def select_over_layers(scores, p):
    """The released normalisation, over axis 0."""
    shares = scores / scores.sum(0, keepdim=True)
    sorted_, order = shares.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, sorted_.cumsum(-1) - sorted_ < p)


def test_permuted_layers_permute_the_answer_and_a_layer_does_not_depend_on_the_others():
    scores = torch.tensor([[0.1, 0.3, 0.5, 0.1], [0.05, 0.05, 0.8, 0.1], [0.25, 0.25, 0.3, 0.2]], dtype=torch.float64)
    answer = select(scores, 0.5)
    assert torch.equal(select(scores[[2, 0, 1]], 0.5), answer[[2, 0, 1]])
    assert torch.equal(select(scores[:1], 0.5), answer[:1])
    assert not torch.equal(select_over_layers(scores[:1], 0.5), select_over_layers(scores, 0.5)[:1])
    assert not torch.equal(select_over_layers(scores, 0.5), answer)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6).filter(any), min_size=1, max_size=4),
    percent=st.integers(1, 100),
)
def test_the_chosen_hold_p_and_no_smaller_set_does(counts, percent):
    for row, found in zip(counts, chosen(torch.tensor(counts), percent / 100), strict=True):
        held, highest = sum(row[e] for e in found), sorted(row, reverse=True)
        assert 100 * held >= percent * sum(row)
        assert 100 * sum(highest[: len(found) - 1]) < percent * sum(row)
        assert all(row[e] > 0 for e in found)


@pytest.mark.parametrize("family", ["DeepSeek-V2", "GptOss"])
def test_scores_to_adapter(family, tmp_path):
    model, base = tiny(family), tiny(family)
    batch = task()
    stats = read_stats(model, [batch], ["law"])
    scores = esft_token.rank(stats, "law")
    torch.testing.assert_close(scores.sum(1), torch.ones(len(scores)).double())
    config = Config(p=0.5, steps=8, learning_rate=2e-2)
    tuned = train(model, scores, stats.layers, [batch] * 8, config)
    assert tuned.losses[-1] < 0.9 * tuned.losses[0]
    changes = difference(base, model)
    expected = dict(zip(stats.layers, map(tuple, map(sorted, chosen(scores, 0.5))), strict=True))
    assert changes.experts == tuned.adapter.experts == expected
    assert not changes.whole
    assert tuned.adapter.facts["config"]["p"] == 0.5
    assert tuned.adapter.facts["method"] == "specialize/esft"
    tuned.adapter.save(tmp_path)
    merge(base, type(tuned.adapter).load(tmp_path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.state_dict().items())


def test_relevant_experts_learn_the_task_and_those_it_never_uses_do_not():
    batch, config = task(), Training(steps=6, learning_rate=2e-2, weight_decay=0.0)
    stats = read_stats(tiny("OLMoE"), [batch], ["law"])
    scores = esft_token.rank(stats, "law")
    assert bool((scores[-1] == 0).any()), "the task should leave experts unused"
    unused = {stats.layers[-1]: (scores[-1] == 0).nonzero().flatten().tolist()}
    relevant = {stats.layers[-1]: scores[-1].argsort(descending=True)[: len(unused[stats.layers[-1]])].tolist()}
    right = tune(tiny("OLMoE"), relevant, [batch] * 6, config).losses
    wrong = tune(tiny("OLMoE"), unused, [batch] * 6, config).losses
    assert right[-1] < 0.9 * right[0]
    assert wrong == (right[0],) * 6


def test_shared_experts_are_in_the_adapter_as_whole_tensors():
    model, base, batch = tiny("Qwen2-MoE"), tiny("Qwen2-MoE"), task()
    scores = torch.ones(3, 8)
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    tuned = train(model, scores, names, [batch], Config(p=0.1, steps=1, shared=True))
    assert tuned.adapter.experts == dict.fromkeys(names, (0,))
    assert len(tuned.adapter.whole) == 9
    assert all(".shared_expert." in name for name in tuned.adapter.whole)
    assert set(difference(base, model).whole) <= set(tuned.adapter.whole)


def test_wrong_scores_and_shares_say_what_was_expected():
    with pytest.raises(ValueError, match=r"p: expected above 0 and at most 1, received 1\.5"):
        Config(p=1.5)
    with pytest.raises(UsageError, match="none in layer 1"):
        select(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.2)
    with pytest.raises(UsageError, match="none below 0 or undefined"):
        select(torch.tensor([[1.0, -0.1]]), 0.2)
