# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import dsmoe
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.ranking.dsmoe import COMMON, SALIENT
from anabranch.models.mixtures.families import tiny
from tests.measure.experts.handmade import handmade, recorded
from tests.measure.experts.planted import documents, place, world


def test_four_tokens_and_two_experts_by_hand():
    # tokens 0 and 1 are salient; expert 0 is chosen by 0, 1 and 2, expert 1 by 3
    stats = handmade({SALIENT: 2, COMMON: 2}, top_k=1, count={SALIENT: [[2, 0]], COMMON: [[1, 1]]})
    # P(0|D) = 3/4, P(S|0) = 2/3, P(C|0) = 1/3;  P(1|D) = 1/4, P(S|1) = 0, P(C|1) = 1
    assert dsmoe.rank(stats)[0].tolist() == pytest.approx([3 / 4 * (2 / 3 - 1 / 3), 1 / 4 * (0 - 1)])


@settings(max_examples=100, deadline=None)
@given(
    salient=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    common=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_equals_the_product_of_its_definition(salient, common):
    scores = dsmoe.rank(handmade({SALIENT: 9, COMMON: 9}, count={SALIENT: [salient], COMMON: [common]}))
    for e, (s, c) in enumerate(zip(salient, common, strict=True)):
        expected = (s + c) / 18 * (s / (s + c) - c / (s + c)) if s + c else 0.0
        assert float(scores[0, e]) == pytest.approx(expected)


def test_few_salient_tokens_put_what_is_never_used_above_what_serves_them_all():
    """Why the median splits unless told otherwise."""
    stats = handmade({SALIENT: 1, COMMON: 9}, count={SALIENT: [[1, 0]], COMMON: [[3, 0]]})
    assert float(dsmoe.rank(stats)[0, 0]) < float(dsmoe.rank(stats)[0, 1]) == 0


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_saliency_equals_finite_differences(family):
    model = tiny(family).double()
    model.set_experts_implementation("eager")
    batch = documents(torch.Generator().manual_seed(3), count=2, length=5)
    saliency = dsmoe.saliency(model, batch)
    step, width = 2e-3, model.config.hidden_size
    embedded = model.get_input_embeddings()(batch.input_ids).detach()

    def document_loss(rows, b):
        length = int(batch.attention_mask[b].sum())
        with torch.no_grad():
            logs = model(inputs_embeds=rows[:, :length]).logits.log_softmax(-1)
        of_next = [-logs[:, t, batch.input_ids[b, t + 1]] for t in range(length - 1)]
        return torch.stack(of_next).mean(0)

    for b in range(2):
        for i in range(int(batch.attention_mask[b].sum())):
            rows = embedded[b].repeat(2 * width, 1, 1)
            rows[:width, i] += step * torch.eye(width).double()
            rows[width:, i] -= step * torch.eye(width).double()
            losses = document_loss(rows, b)
            slope = (losses[:width] - losses[width:]) / (2 * step)
            assert float(saliency[b, i]) == pytest.approx(
                float((embedded[b, i] * slope).norm()), rel=2e-3
            )  # norms of the model are float32
    assert float((saliency * (1 - batch.attention_mask)).abs().max()) == 0


def test_neither_padding_nor_neighbours_change_a_saliency():
    model = tiny("OLMoE")
    batch = documents(torch.Generator().manual_seed(0))
    together = dsmoe.saliency(model, batch)
    for b in range(3):
        n = int(batch.attention_mask[b].sum())
        alone = Batch(batch.input_ids[b : b + 1, :n], torch.ones(1, n), batch.labels[b : b + 1, :n], batch.folds[:1])
        assert torch.allclose(dsmoe.saliency(model, alone)[0], together[b, :n], rtol=1e-3, atol=1e-6)


def test_the_median_splits_each_document_and_tokens_of_no_domain_are_left_out():
    saliency = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0], [5.0, 7.0, 6.0, 0.0, 0.0]])
    of_domain = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    assert dsmoe.split(saliency, of_domain, None).tolist() == [[0, 1, 0, 1, -1], [1, 0, 0, -1, -1]]
    assert dsmoe.split(saliency, of_domain, 5.0).tolist() == [[1, 1, 1, 1, -1], [0, 0, 0, -1, -1]]
    assert dsmoe.split(saliency, torch.ones(2, 5).bool(), None)[0].tolist() == [0, 1, 0, 1, 0]


def test_what_is_collected_counts_the_tokens_of_either_kind():
    made = world(0, mixed=True)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    batch = made.batches[0]
    stats = dsmoe.collect(made.model, [batch])
    kind = dsmoe.split(dsmoe.saliency(made.model, batch), batch.attention_mask.bool(), None).flatten()
    assert [stats.num_tokens(label) for label in (SALIENT, COMMON)] == [int((kind == i).sum()) for i in (0, 1)]
    for layer, seen in enumerate(recorded(made.model, batch)):
        expected = torch.zeros(8)
        for row in (kind == 0).nonzero().flatten().tolist():
            expected[seen.triple.selected_experts[row]] += 1
        assert stats.of("count", SALIENT)[layer].tolist() == expected.tolist()
        mean = stats.of("saliency", SALIENT)[layer] / stats.of("count", SALIENT)[layer].clamp(min=1)
        assert float(mean.max()) <= float(dsmoe.saliency(made.model, batch).max())
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.parametrize("family", ["OLMoE", "Qwen3-MoE"])
def test_the_expert_of_salient_words_is_first_and_at_chance_in_the_control(family):
    def places(seeds, planted):
        worlds = [world(seed, planted, family, mixed=True) for seed in seeds]
        return [place(dsmoe.rank(dsmoe.collect(made.model, made.batches)), made) for made in worlds]

    assert places(range(6), True) == [0.0] * 6
    control = places(range(20), False)
    assert 0.3 < sum(control) / 20 < 0.7  # deviation of the mean at chance: 0.065
    assert control.count(0.0) <= 4


def test_a_threshold_that_nothing_reaches_is_refused():
    made = world(0, mixed=True)
    with pytest.raises(UsageError, match=r"saw no token[\s\S]*tokens of domain tokens"):
        dsmoe.rank(dsmoe.collect(made.model, made.batches, eps=1e9))
