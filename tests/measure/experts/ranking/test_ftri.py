# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import ftri
from anabranch.measure.experts.ranking.batches import Batch, read_stats
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OTHER, OWN, world


def test_maps_by_hand():
    # class y: prompts of 2 and 4 tokens that choose expert 0 twice and once; others: one prompt of 4, once
    stats = handmade(
        {"y": 6, "n": 4}, {"y": 2, "n": 1}, top_k=1,
        count={"y": [[3, 3]], "n": [[1, 3]]}, document_rate={"y": [[1.25, 0.75]], "n": [[0.25, 0.75]]},
    )  # fmt: skip
    assert ftri.rank(stats, "y", ["n"]).tolist() == [[0.625 - 0.25, 0.375 - 0.75]]
    assert ftri.rank(stats, "y", ["n"], per_token=False).tolist() == [[0.5, -1.5]]


def context_free(model):
    """Attention adds nothing, so that a word is routed the same wherever it stands."""
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("family", ["OLMoE", "Qwen3-MoE"])
def test_a_prompt_written_twice_changes_the_raw_map_alone(family):
    made = world(0, planted=False, family=family)
    model = context_free(made.model)
    once = made.batches[0]
    once = Batch(once.input_ids.clamp(min=3), torch.ones_like(once.attention_mask), once.labels, once.folds)
    twice = Batch(*(value.repeat(1, 2) for value in (once.input_ids, once.attention_mask, once.labels)), once.folds)
    maps = [read_stats(model, [batch], LABELS) for batch in (once, twice)]
    plain = [ftri.rank(stats, OWN, [OTHER]) for stats in maps]
    raw = [ftri.rank(stats, OWN, [OTHER], per_token=False) for stats in maps]
    assert torch.allclose(plain[0], plain[1], atol=1e-12)
    assert torch.allclose(2 * raw[0], raw[1], atol=1e-9)
    assert float(raw[0].abs().max()) > 1


def test_equals_the_slow_loop_over_prompts():
    made = world(1)
    batch = made.batches[0]
    stats = read_stats(made.model, [batch], LABELS)
    seen = recorded(made.model, batch)
    for per_token in (True, False):
        difference = torch.zeros(len(seen), 8).double()
        for b in range(len(batch.input_ids)):
            map_p = torch.zeros_like(difference)
            for layer, of in enumerate(seen):
                for document, _, row, _ in real_tokens(batch):
                    if document == b:
                        map_p[layer, of.triple.selected_experts[row]] += 1
            length = float(batch.attention_mask[b].sum()) if per_token else 1.0
            difference += map_p / length / 6 * (1 if int(batch.labels[b, 0]) == 0 else -1)
        assert torch.allclose(ftri.rank(stats, OWN, [OTHER], per_token=per_token), difference)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_several_other_classes_are_one_and_exchanging_the_sides_changes_the_sign(seed):
    g = torch.Generator().manual_seed(seed)
    rates = torch.rand(3, 2, 4, generator=g, dtype=torch.float64)
    count = {"y": 3, "n": 2, "m": 5}
    apart = handmade(count, count, document_rate=dict(zip(count, rates, strict=True)))
    joined = handmade({"y": 3, "n": 7}, document_rate={"y": rates[0], "n": rates[1] + rates[2]})
    assert torch.allclose(ftri.rank(apart, "y", ["n", "m"]), ftri.rank(joined, "y", ["n"]))
    assert torch.allclose(ftri.rank(joined, "y", ["n"]), -ftri.rank(joined, "n", ["y"]))


@pytest.mark.parametrize("others", [(), ("y",), ("n", "n")])
def test_a_contrast_needs_another_side(others):
    stats = handmade({"y": 1, "n": 1}, document_rate={"y": [[1, 0]], "n": [[0, 1]]})
    with pytest.raises(UsageError, match=r"ranked against other labels[\s\S]*of n"):
        ftri.rank(stats, "y", others)


def test_a_side_without_tokens_is_refused():
    stats = handmade({"y": 1, "n": 0}, document_rate={"y": [[1, 0]], "n": [[0, 0]]})
    with pytest.raises(UsageError, match="saw no token"):
        ftri.rank(stats, "y", ["n"])
