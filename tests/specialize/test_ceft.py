# SPDX-License-Identifier: Apache-2.0
"""CEFT: the n highest of every layer learn and all else stays; with all experts it is plain training of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.adapter import difference, fused_of
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.specialize.ceft import Config, select, train

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(4))
BATCH = Batch(IDS, torch.ones_like(IDS), torch.zeros_like(IDS), torch.zeros(3, dtype=torch.int64))


def names_of(model):
    return [layer.name for layer in mixture_layers(model)]


def test_by_hand_with_ties_to_the_lower_index():
    scores = torch.tensor([[0.1, 5.0, -2.0, 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert select(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-9, 9), min_size=5, max_size=5), min_size=1, max_size=4), n=st.integers(1, 5))
def test_none_that_is_left_out_is_above_one_that_is_in(rows, n):
    found = select(torch.tensor(rows), n)
    for row, mask in zip(rows, found.tolist(), strict=True):
        inside = [score for score, chosen in zip(row, mask, strict=True) if chosen]
        outside = [score for score, chosen in zip(row, mask, strict=True) if not chosen]
        assert len(inside) == n
        assert min(inside) >= max(outside, default=-99)


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3", "GptOss"])
def test_only_the_chosen_change_and_the_loss_falls(family):
    model, base = tiny(family), tiny(family)
    scores = torch.rand(len(names_of(model)), 8, generator=torch.Generator().manual_seed(5))
    config = Config(num_experts=3, steps=6, learning_rate=5e-3)
    tuned = train(model, scores, names_of(model), [BATCH] * 6, config)
    assert tuned.losses[-1] < tuned.losses[0]
    changes = difference(base, model)
    expected = [set(row.topk(3).indices.tolist()) for row in scores]
    assert [set(own) for own in changes.experts.values()] == expected
    assert not changes.whole, "routers and all that is no expert"


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_all_experts_are_the_plain_training_of_experts(family):
    model, plain = tiny(family), tiny(family)
    config = Config(num_experts=8, steps=3, learning_rate=1e-3)
    ours = train(model, torch.zeros(len(names_of(model)), 8), names_of(model), [BATCH] * 3, config).losses
    stacked = {name: value for layer in mixture_layers(plain) for name, value in fused_of(layer).items()}
    optimizer = torch.optim.AdamW(
        [{"params": [value], "weight_decay": 0.0 if "bias" in name else 0.1} for name, value in stacked.items()],
        lr=1e-3, betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(3):
        logits = plain(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
        assert loss.item() == pytest.approx(ours[step], abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stacked.values(), 1.0)
        optimizer.step()
    for name, value in stacked.items():
        # a gradient near zero may round to the other sign, which is a step of the rate to the other side
        differs = (model.get_parameter(name) - value).abs()
        assert differs.max() < 6e-3
        assert differs.mean() < 1e-6


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match="expected: 1 to 4\n  received: 5"):
        select(torch.zeros(2, 4), 5)
    with pytest.raises(UsageError, match="rank nothing"):
        select(torch.tensor([[1.0, torch.nan]]), 1)
    with pytest.raises(ValueError, match="num_experts: expected at least 1, received 0"):
        Config(num_experts=0)
