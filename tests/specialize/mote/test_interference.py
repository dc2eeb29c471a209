# SPDX-License-Identifier: Apache-2.0
"""What one step learns and the others feel, against the first-order estimate."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.measure.conflict import gradient
from anabranch.specialize.mote.collate import StepSpanCollator, chain_row
from anabranch.specialize.mote.interference import step_conflict, step_loss, step_transfer
from tests.specialize.mote.tiny import tiny

CHAIN = {"analysis": "w1 w2 w3", "guidance": "w4 w5", "answer": "w6 w7 w8"}


def batch_of(mote, seed, chain=CHAIN):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(6):
        words = iter(torch.randint(30, (20,), generator=generator).tolist())
        told = {step: " ".join(f"w{next(words)}" for _ in text.split()) for step, text in chain.items()}
        rows.append(chain_row(mote.tokenizer, mote.tokens, "w20 w21", told))
    return StepSpanCollator(mote.tokens, 37, question="first")(rows)


def test_a_small_step_gains_what_the_gradients_say():
    mote = tiny().double()
    learnt, asked, rate = batch_of(mote, 0), batch_of(mote, 1), 1e-3
    parameters = list(mote.trained().values())
    before = [parameter.detach().clone() for parameter in parameters]
    gains = step_transfer(mote, learnt, asked, rate=rate)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    for s in range(3):
        along = gradient(step_loss(mote, learnt, s), parameters)
        for t in range(3):
            loss = step_loss(mote, asked, t)
            expected = rate * float(along @ gradient(loss, parameters)) / float(along.norm() * loss.detach())
            assert float(gains[s, t]) == pytest.approx(expected, rel=0.05, abs=5e-7)  # losses are float32


def test_learning_a_step_helps_it_on_the_same_batch_and_one_loss_is_all_its_tokens():
    mote = tiny()
    batch = batch_of(mote, 0)
    assert (step_transfer(mote, batch, batch, rate=0.05).diagonal() > 0).all()
    logits = mote(batch["input_ids"], batch["step_ids"], attention_mask=batch["attention_mask"]).logits
    told = []
    for b in range(6):
        for t in range(1, batch["input_ids"].shape[1]):
            if batch["labels"][b, t] >= 0 and batch["step_ids"][b, t] == 1:
                told.append(-logits[b, t - 1].log_softmax(-1)[batch["labels"][b, t]])
    torch.testing.assert_close(step_loss(mote, batch, 1), torch.stack(told).mean())


def test_conflict_has_ones_own_noise_on_its_diagonal():
    mote = tiny()
    batch = batch_of(mote, 0)
    found = step_conflict(mote, [batch, batch])
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    torch.testing.assert_close(found, found.T)
    assert (step_conflict(mote, [batch, batch_of(mote, 1)]).diagonal() < 1).all()


def test_a_batch_without_a_step_is_refused():
    mote = tiny()
    with pytest.raises(UsageError, match="no chain of the batch has the step 'guidance'"):
        step_loss(mote, batch_of(mote, 0, {"analysis": "a", "answer": "a"}), 1)
