# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import super_experts
from anabranch.measure.experts.ranking.batches import read_stats
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import open_layers
from tests.measure.experts.handmade import handmade, recorded
from tests.measure.experts.planted import LABELS, OTHER, OWN, world


def drawn(seed=0, num_layers=4, num_experts=200):
    """Peaks between 0.5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64) / 2


def places(peak, **options):
    stats = handmade({"a": 1}, peak={"a": peak})
    return [(one.layer, one.expert) for one in super_experts.found(stats, **options)]


def test_each_condition_by_hand():
    peak = drawn()  # of 800, four can be above the 99.5th percentile
    peak[0, 7], peak[1, 3], peak[2, 0], peak[3, 5] = 1000.0, 120.0, 90.0, 500.0
    assert places(peak) == [(0, 7), (1, 3)], "(2, 0) is below a tenth of the highest, (3, 5) in the last quarter"
    assert places(peak, depth=1.0) == [(0, 7), (3, 5), (1, 3)]
    assert places(peak, share=0.05) == [(0, 7), (1, 3), (2, 0)]
    assert places(peak, percentile=99.8) == [(0, 7)], "linear between the second and the third of 800"
    assert places(peak, ratio=500.0) == [(0, 7)]


def test_what_is_reported():
    peak = torch.tensor([[100.0, 2.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0]])
    (one,) = super_experts.found(handmade({"a": 1}, peak={"a": peak}))
    assert one == (0, 0, 100.0, 50.0)  # the median of 100, 3, 2, 2, 1, 1; who never ran has no part in it


@pytest.mark.parametrize("family", ["OLMoE", "GptOss"])
def test_one_scaled_expert_is_found_alone_and_in_the_drawn_model_none(family):
    for seed in range(4):
        made = world(seed, planted=False, family=family)
        stats = read_stats(made.model, made.batches, LABELS, outputs=True)
        assert super_experts.found(stats) == []
        published = super_experts.found(stats, ratio=0.0, depth=1.0)
        assert published, "by the published rule the largest of any model is one"
        assert published[0].to_median < 20
        chosen = int(stats.of("count", OWN)[0].argmax())
        with torch.no_grad():
            own = ExpertBank(open_layers(made.model)[0])[chosen].tensors()
            for name in own.keys() & {"down", "down_bias"}:
                own[name].mul_(100)
        again = super_experts.found(read_stats(made.model, made.batches, LABELS, outputs=True))
        assert [(one.layer, one.expert) for one in again] == [(0, chosen)]


def test_equals_the_slow_loop_over_tokens_slots_and_channels():
    made = world(2)
    batch = made.batches[0]
    stats = read_stats(made.model, [batch], LABELS, outputs=True)
    for layer, seen in enumerate(recorded(made.model, batch, outputs=True)):
        highest = [[0.0] * 8, [0.0] * 8]
        for row in batch.attention_mask.flatten().nonzero().flatten().tolist():
            label = int(batch.labels.flatten()[row])
            for slot, e in enumerate(seen.triple.selected_experts[row].tolist()):
                highest[label][e] = max(highest[label][e], *seen.outputs[row, slot].abs().tolist())
        for label, name in enumerate(LABELS):
            assert super_experts.rank(stats, name)[layer].tolist() == pytest.approx(highest[label])


def test_the_floor_of_the_released_code_lets_small_peaks_through():
    peak = drawn()
    peak[0, 7], peak[1, 3] = 9.0, 0.85  # a tenth of the highest is 0.9, its floor 0
    options = {"ratio": 0.0, "percentile": 0.0, "depth": 1.0}
    exact, floor = places(peak, **options), places(peak, **options, floor=True)
    assert (1, 3) not in exact
    assert (1, 3) in floor
    assert len(floor) >= 799


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-3, 1e3), labels=st.integers(1, 3))
def test_the_scale_does_not_matter_and_labels_are_joined_by_their_maximum(seed, scale, labels):
    peak = drawn(seed, 3, 8) * torch.where(drawn(seed + 1, 3, 8) > 0.97, 50.0, 1.0)
    assert places(peak) == places(peak * scale)
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(labels, peak.shape, generator=generator)
    names = [f"label {i}" for i in range(labels)]
    split = handmade(dict.fromkeys(names, 1), peak={n: peak * (owner == i) for i, n in enumerate(names)})
    assert [one[:2] for one in super_experts.found(split)] == places(peak)


def test_peaks_have_to_be_collected():
    stats = handmade({OWN: 1, OTHER: 1}, count={OWN: [[1, 0]], OTHER: [[0, 1]]})
    with pytest.raises(UsageError, match=r"hold no 'peak'[\s\S]*profile again with --outputs"):
        super_experts.found(stats)
