# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import seuf
from anabranch.measure.experts.ranking.batches import Batch
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_rows_by_hand():
    # a document of 1 token with (1, 0) and one of 3 with (0, 1) each: each document has half a say
    stats = handmade({"f": 4}, {"f": 2}, document_probability={"f": [[1.0, 1.0]]}, probability={"f": [[1.0, 3.0]]})
    assert seuf.rank(stats, "f").tolist() == [[0.5, 0.5]]
    over_tokens = stats.of("probability", "f") / stats.num_tokens("f")
    assert over_tokens.tolist() == [[0.25, 0.75]], "the mean over tokens follows the long one"


@pytest.mark.parametrize("family", ["OLMoE", "GptOss"])
def test_equals_the_slow_loop_over_documents(family):
    made = world(6, family=family)
    batch = made.batches[0]
    scores = seuf.rank(seuf.collect(made.model, [batch], LABELS), OWN)
    assert torch.allclose(scores.sum(1), torch.ones(len(scores)).double())
    for layer, seen in enumerate(recorded(made.model, batch)):
        of_document = {}
        for b, _, row, label in real_tokens(batch):
            if label == 0:
                of_document.setdefault(b, []).append(seen.triple.router_logits[row].double().softmax(-1))
        expected = sum(sum(rows) / len(rows) for rows in of_document.values()) / len(of_document)
        assert torch.allclose(scores[layer], expected)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    word=st.integers(10, 49),
)
def test_the_length_of_a_document_of_one_word_does_not_matter(lengths, seed, word, fixed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 50, (len(lengths),), generator=generator)
    words[0] = word
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    folds = torch.zeros(len(lengths), dtype=torch.int64)
    many = Batch(words[:, None] * mask, mask, torch.zeros_like(mask), folds)
    alone = Batch(words[:, None], torch.ones(len(lengths), 1), torch.zeros(len(lengths), 1).long(), folds)
    scores = [seuf.rank(seuf.collect(fixed, [batch], ["f"], num_folds=1), "f") for batch in (many, alone)]
    assert torch.allclose(scores[0], scores[1], atol=1e-5)


@pytest.fixture(scope="module")
def fixed():
    """A model whose words are routed the same wherever they stand."""
    model = world(0).model
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    return model


def test_the_sum_has_to_be_collected():
    with pytest.raises(UsageError, match=r"hold no 'document_probability'"):
        seuf.rank(handmade({"a": 1}, probability={"a": [[1]]}), "a")
