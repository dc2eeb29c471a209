# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import reap
from anabranch.measure.experts.ranking.batches import read_stats
from tests.measure.experts.handmade import handmade, real_tokens, recorded
from tests.measure.experts.planted import LABELS, OWN, world


def test_a_rare_strong_expert_is_above_a_frequent_weak_one_and_who_is_never_routed_has_none():
    # expert 0: ten tokens of share 0.5 and norm 2; expert 1: one of share 0.5 and norm 6; expert 2: none
    stats = handmade({"a": 10}, count={"a": [[10, 1, 0]]}, share_norm={"a": [[10.0, 3.0, 0.0]]})
    assert reap.rank(stats, "a").tolist() == [[1.0, 3.0, 0.0]]
    as_a_sum = stats.of("share_norm", "a")
    assert int(as_a_sum.argmax()) == 0, "the sum turns them round"
    as_a_plain_quotient = as_a_sum / stats.of("count", "a")
    assert as_a_plain_quotient.isnan().any(), "and the plain quotient has no number for the third"


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V2"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_the_slow_loop(family, renormalise):
    made = world(5, family=family)
    batch = made.batches[0]
    scores = reap.rank(read_stats(made.model, [batch], LABELS, outputs=True), OWN, renormalise=renormalise)
    for layer, seen in enumerate(recorded(made.model, batch, outputs=True)):
        added = [[] for _ in range(8)]
        for _, _, row, label in real_tokens(batch):
            if label == 0:
                weights = seen.triple.routing_weights[row].double()
                weights = weights / weights.sum() if renormalise else weights
                for slot, e in enumerate(seen.triple.selected_experts[row].tolist()):
                    added[e].append(float(weights[slot]) * float(seen.outputs[row, slot].norm()))
        expected = [sum(values) / len(values) if values else 0.0 for values in added]
        assert scores[layer].tolist() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), times=st.integers(1, 9))
def test_the_same_tokens_read_several_times_change_nothing(seed, times):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 4, (2, 5), generator=generator).double()
    norm = count * torch.rand(2, 5, generator=generator, dtype=torch.float64)
    once, often = (handmade({"a": 9 * n}, count={"a": n * count}, share_norm={"a": n * norm}) for n in (1, times))
    assert torch.allclose(reap.rank(once, "a"), reap.rank(often, "a"))
    assert not reap.rank(once, "a").isnan().any()


def test_outputs_have_to_be_collected():
    with pytest.raises(UsageError, match=r"hold no 'share_norm'[\s\S]*profile again with --outputs"):
        reap.rank(handmade({"a": 1}, count={"a": [[1, 0]]}), "a")
