# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import tcess
from anabranch.measure.experts.ranking.tcess import masked_logits
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_a_matrix_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 4.0, 3.9, -1.0]])
    assert masked_logits(logits).tolist() == [[3.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]]
    two = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 4.0, 3.9, 0.0]])
    assert torch.equal(masked_logits(logits, 2), two)
    # of the two highest the second has 1 / (1 + e) = 0.27 and 1 / (1 + e^0.1) = 0.475 of the softmax
    assert masked_logits(logits, 2, 0.3).tolist() == [[3.0, 0.0, 0.0, 0.0], two[1].tolist()]
    stats = handmade({"a": 2}, tcess={"a": two.sum(0)[None]})
    assert tcess.rank(stats, "a")[0].tolist() == pytest.approx([1.5, 2.0, 2.95, 0.0])


def test_with_negative_logits_the_highest_expert_is_behind_one_never_high_unless_probabilities_are_summed():
    logits = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    published = masked_logits(logits).mean(0)
    assert int(published.argmin()) == 0
    softmax = masked_logits(logits, softmax=True).mean(0)
    assert int(softmax.argmax()) == 0
    assert float(softmax[0]) == pytest.approx(float(logits[0].softmax(-1)[0]))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), highest=st.integers(1, 6), least=st.floats(-1, 1), softmax=st.booleans())
def test_equals_the_definition_token_by_token(seed, highest, least, softmax):
    logits = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    masked = masked_logits(logits, highest, least, softmax=softmax)
    for row, made in zip(logits.tolist(), masked.tolist(), strict=True):
        top = sorted(range(6), key=lambda e: -row[e])[:highest]
        exps = {e: float(torch.tensor(row[e]).double().exp()) for e in range(6)}
        for e in range(6):
            counted = e in top and exps[e] / sum(exps[j] for j in top) >= least
            value = exps[e] / sum(exps.values()) if softmax else row[e]
            assert made[e] == pytest.approx(value if counted else 0.0, abs=1e-5)


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3"])
def test_what_is_collected_equals_the_slow_loop_and_leaves_the_other_sums_as_they_are(family):
    made = world(3, planted=False, family=family)
    batch = made.batches[0]
    stats = tcess.collect(made.model, [batch], LABELS, highest=2)
    scores = tcess.rank(stats, OWN)
    assert float(stats.of("count", OWN)[0].sum()) == 2 * stats.num_tokens(OWN)
    for layer, seen in enumerate(recorded(made.model, batch)):
        rows = [row for _, _, row, label in real_tokens(batch) if label == 0]
        expected = torch.zeros(8).double()
        for row in rows:
            logits = seen.triple.router_logits[row].double()
            for e in logits.argsort(descending=True)[:2].tolist():
                expected[e] += logits[e] / len(rows)
        assert torch.allclose(scores[layer], expected)


def test_wrong_use():
    made = world(0)
    with pytest.raises(UsageError, match=r"no so many highest experts[\s\S]*expected: 1 to 8\n  received: 9"):
        tcess.collect(made.model, made.batches, LABELS, highest=9)
    with pytest.raises(UsageError, match=r"hold no 'tcess'"):
        tcess.rank(handmade({"a": 1}, count={"a": [[1]]}), "a")
