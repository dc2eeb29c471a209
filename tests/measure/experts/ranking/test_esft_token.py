# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import esft_token
from anabranch.measure.experts.ranking.batches import read_stats
from anabranch.measure.experts.ranking.cumulative import relevant
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world

COUNTS = [[10, 6, 2, 2], [1, 1, 1, 17], [5, 5, 5, 5]]


def over_layers(counts_LN):
    """The variant that divides by the sum over the layers in place of the layer's own."""
    return counts_LN / counts_LN.sum(0, keepdim=True)


def test_by_hand():
    stats = handmade({"a": 10}, count={"a": COUNTS})
    scores = esft_token.rank(stats, "a")
    assert torch.equal(scores[0], torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64))
    assert relevant(scores, 0.51).tolist() == [[True, True, False, False], [False] * 3 + [True], [True] * 3 + [False]]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), p=st.floats(0.05, 1.0))
def test_permuted_layers_permute_the_answer_and_nothing_else(seed, p):
    generator = torch.Generator().manual_seed(seed)
    counts_LN = torch.randint(0, 30, (4, 6), generator=generator).double()
    counts_LN[:, 0] += 1
    order, changed = torch.randperm(4, generator=generator), counts_LN.clone()
    changed[0] = torch.randint(1, 30, (6,), generator=generator).double()
    chosen, permuted, other = (
        relevant(esft_token.rank(handmade({"a": 1}, count={"a": counts}), "a"), p)
        for counts in (counts_LN, counts_LN[order], changed)
    )
    assert torch.equal(chosen[order], permuted)
    assert torch.equal(chosen[1:], other[1:]), "a layer does not read the others"


def test_a_sum_over_layers_would_not_pass():
    counts_LN = torch.tensor(COUNTS).double()
    changed = counts_LN.clone()
    changed[0] = torch.tensor([1.0, 1.0, 17.0, 1.0])
    assert not torch.allclose(over_layers(counts_LN).sum(1), torch.ones(3).double())
    assert not torch.allclose(over_layers(counts_LN)[1:], over_layers(changed)[1:])
    ours = [esft_token.rank(handmade({"a": 10}, count={"a": counts}), "a") for counts in (counts_LN, changed)]
    assert torch.equal(ours[0][1:], ours[1][1:])
    with pytest.raises(UsageError, match="within the layer"):
        relevant(over_layers(counts_LN), 0.2)


@pytest.mark.parametrize("family", ["OLMoE", "Qwen3-MoE"])
def test_equals_the_slow_loop(family):
    made = world(2, planted=False, family=family)
    batch = made.batches[0]
    scores = esft_token.rank(read_stats(made.model, [batch], LABELS), OWN)
    assert torch.allclose(scores.sum(1), torch.ones(len(scores)).double())
    for layer, seen in enumerate(recorded(made.model, batch)):
        rows = [row for _, _, row, label in real_tokens(batch) if label == 0]
        chosen = [e for row in rows for e in seen.triple.selected_experts[row].tolist()]
        assert scores[layer].tolist() == pytest.approx([chosen.count(e) / (2 * len(rows)) for e in range(8)])


def test_a_label_without_tokens_has_no_shares():
    with pytest.raises(UsageError, match=r"no token of 'a' was routed"):
        esft_token.rank(handmade({"a": 0}, count={"a": [[0, 0]]}), "a")
