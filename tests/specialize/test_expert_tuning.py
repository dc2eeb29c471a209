# SPDX-License-Identifier: Apache-2.0
"""The loss of next tokens and the training that methods of choosing experts share."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.families import tiny
from anabranch.specialize.chosen_experts import ChosenExperts
from anabranch.specialize.expert_tuning import (
    Kept,
    NextTokens,
    Training,
    by_layer,
    loop_config,
    next_token_loss,
    rows_of,
    tune,
)
from anabranch.train.optimizer import build_optimizer


def batch_of(ids, mask=None, answers=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return Batch(ids, mask, torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.int64), answers)


def loss_of(logits, batch):
    rows = rows_of(batch)
    return next_token_loss(logits, rows["input_ids"], rows["learnt"])


def slow_loss(logits, ids, mask, answers):
    losses = []
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if mask[b, t] and mask[b, t - 1] and answers[b, t]:
                row = logits[b, t - 1].double()
                losses.append(float(row.exp().sum().log() - row[ids[b, t]]))
    return sum(losses) / len(losses) if losses else None


@settings(max_examples=100, deadline=None)
@given(B=st.integers(1, 3), S=st.integers(2, 7), left=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_the_loss_is_of_answers_alone_and_equals_a_slow_loop(B, S, left, seed):
    g = torch.Generator().manual_seed(seed)
    ids, logits = torch.randint(0, 5, (B, S), generator=g), torch.randn(B, S, 5, generator=g)
    mask = (torch.arange(S) < torch.randint(1, S + 1, (B, 1), generator=g)).long()
    mask = mask.flip(1) if left else mask
    answers = torch.rand(B, S, generator=g) < 0.6
    expected = slow_loss(logits, ids, mask, answers)
    if expected is None:
        with pytest.raises(UsageError, match="no token to learn"):
            loss_of(logits, batch_of(ids, mask, answers))
    else:
        found = loss_of(logits, batch_of(ids, mask, answers))
        assert float(found) == pytest.approx(expected, abs=1e-5)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    ids = torch.tensor([[1, 2, 3]])
    assert float(loss_of(torch.zeros(1, 3, 7), batch_of(ids))) == pytest.approx(torch.tensor(7.0).log().item())


def test_training_takes_no_more_batches_than_steps_and_biases_do_not_decay():
    model, drawn = tiny("GptOss"), itertools.count()
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = (batch_of(ids) for _ in drawn)
    before = torch.get_rng_state()
    tuned = tune(model, {"model.layers.1.mlp": [3]}, batches, Training(steps=3, learning_rate=1e-2))
    assert len(tuned.losses) == 3
    assert next(drawn) == 3
    assert tuned.losses[2] < tuned.losses[0]
    assert torch.equal(torch.get_rng_state(), before)
    with ChosenExperts(model, {"model.layers.1.mlp": [3]}) as chosen:
        optimizer = build_optimizer(NextTokens(chosen), loop_config(Training(), Kept(), 1, 2))
    groups = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert groups == {0.1: 2, 0.0: 2}


def test_wrong_uses_say_what_was_expected():
    model = tiny("Mixtral")
    with pytest.raises(UsageError, match="nothing was trained"):
        tune(model, {"model.layers.1.mlp": [3]}, [], Training())
    with pytest.raises(UsageError, match="3 layers\n  received: 2"):
        by_layer(torch.ones(2, 8, dtype=torch.bool), ["a", "b", "c"])
    with pytest.raises(ValueError, match="steps: expected at least 1, received 0"):
        Training(steps=0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(AnabranchError, match="step 1: the loss or its gradient is not finite"):
        tune(model, {"model.layers.1.mlp": [3]}, [batch_of(torch.arange(3, 11)[None])], Training())
