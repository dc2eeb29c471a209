# SPDX-License-Identifier: Apache-2.0
"""A step that may not be read is one that is not there; invariants 8 and 9."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.specialize.mote.collate import StepSpanCollator, chain_row
from anabranch.specialize.mote.skip import Skip, attention, check_attention, draw_blocks, positions
from anabranch.specialize.mote.steps import QUESTION
from tests.specialize.mote.tiny import tiny

CHAIN = {"analysis": "w1 w2 w3", "guidance": "w4 w5", "answer": "w6 w7 w8"}


def masked(mote, row, hidden, reposition, side="right"):
    """Logits of a row (padded to four tokens more) whose `hidden` steps no later step may read."""
    longer = chain_row(mote.tokenizer, mote.tokens, "w1 w2 w3 w4 w5", CHAIN)
    batch = StepSpanCollator(mote.tokens, 37, question=None, side=side)([row, longer])
    blocks = torch.zeros(2, 3, 3, dtype=torch.bool)
    blocks[:, :, hidden] = True
    blocks &= torch.ones(3, 3, dtype=torch.bool).tril(-1)
    mask = attention(batch["step_ids"], batch["attention_mask"], blocks)
    places = positions(mask, batch["attention_mask"])
    if not reposition:
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    valid = batch["attention_mask"][0].bool()
    out = mote(batch["input_ids"], batch["step_ids"], attention_mask=mask, position_ids=places).logits
    return out[0, valid], batch["step_ids"][0, valid]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("hidden", [[0], [1], [0, 1]])
def test_08_with_positions_moved_up_it_is_the_chain_without_the_step(family, side, hidden):
    mote = tiny(family)
    row = chain_row(mote.tokenizer, mote.tokens, "w20 w21", CHAIN)
    whole, ids = masked(mote, row, hidden, reposition=True, side=side)
    left = {name: text for number, (name, text) in enumerate(CHAIN.items()) if number not in hidden}
    shorter = chain_row(mote.tokenizer, mote.tokens, "w20 w21", left)
    batch = StepSpanCollator(mote.tokens, 37, question=None)([shorter])
    alone = mote(batch["input_ids"], batch["step_ids"], attention_mask=batch["attention_mask"]).logits[0]
    kept = ~torch.isin(ids, torch.tensor(hidden))
    torch.testing.assert_close(whole[kept], alone, atol=1e-5, rtol=1e-5)


def test_08_with_positions_kept_it_is_the_chain_with_a_gap():
    mote = tiny()
    row = chain_row(mote.tokenizer, mote.tokens, "w20 w21", CHAIN)
    whole, ids = masked(mote, row, [0], reposition=False)
    kept = (ids != 0).nonzero().flatten()
    tokens = torch.tensor([row.input_ids])[:, kept]
    gap = mote(tokens, ids[None, kept], position_ids=kept[None]).logits[0]
    torch.testing.assert_close(whole[kept], gap, atol=1e-5, rtol=1e-5)
    close = mote(tokens, ids[None, kept]).logits[0]
    assert not torch.allclose(gap, close, atol=1e-5)


def test_09_the_hidden_step_is_learnt_all_the_same():
    mote = tiny()
    row = chain_row(mote.tokenizer, mote.tokens, "w20 w21", CHAIN)
    plain, ids = masked(mote, row, [], reposition=True)
    hidden, _ = masked(mote, row, [0], reposition=True)
    before = (ids <= 0).nonzero().flatten()
    torch.testing.assert_close(hidden[before], plain[before])
    assert not torch.allclose(hidden[ids == 2], plain[ids == 2], atol=1e-4)


def slow_mask(ids, valid, blocks):
    length = len(ids)
    return torch.tensor([
        [t == s or bool(s <= t and valid[s] and not (ids[t] >= 0 and ids[s] >= 0 and blocks[ids[t], ids[s]]))
         for s in range(length)] for t in range(length)
    ])  # fmt: skip


@pytest.mark.parametrize("mode", ["pairwise", "transitive"])
def test_masks_are_their_definition(mode):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[QUESTION, 0, 0, 1, 2, 2], [QUESTION, QUESTION, 1, 1, 2, QUESTION], [QUESTION, 2, 2, 2, 2, 2]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for _ in range(20):
        blocks = draw_blocks(ids, 3, Skip(mode=mode, rate=0.7), generator)
        mask = attention(ids, valid, blocks)
        for row in range(3):
            assert torch.equal(mask[row, 0], slow_mask(ids[row], valid[row], blocks[row]))
        if mode == "transitive":  # what is hidden is hidden from every later step, and the last one never is
            assert torch.equal(blocks[0, 1, 0], blocks[0, 2, 0])
            assert not blocks[2].any()


def test_transitive_hides_every_set_of_earlier_steps_evenly_in_the_share_that_was_asked_for():
    ids = torch.tensor([[QUESTION, 0, 1, 2]]).repeat(6000, 1)
    blocks = draw_blocks(ids, 3, Skip(rate=0.6), torch.Generator().manual_seed(0))
    hidden = blocks[:, 2, 0].long() + 2 * blocks[:, 2, 1].long()
    shares = torch.bincount(hidden, minlength=4) / 6000
    assert torch.allclose(shares, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.025)
    assert not draw_blocks(ids, 3, Skip(rate=0.0), torch.Generator().manual_seed(0)).any()
    assert not draw_blocks(ids, 3, Skip(mode="none"), torch.Generator().manual_seed(0)).any()


def test_the_collator_draws_the_masks_of_a_step_from_its_seed():
    mote = tiny(moved=False)
    rows = [chain_row(mote.tokenizer, mote.tokens, "w20 w21", CHAIN)] * 8
    one, two = (StepSpanCollator(mote.tokens, 37, skip=Skip(), seed=3) for _ in range(2))
    first = one(rows)
    assert torch.equal(first["attention_mask"], two(rows)["attention_mask"])
    assert not torch.equal(first["attention_mask"], one(rows)["attention_mask"])
    assert first["attention_mask"].shape == (8, 1, 18, 18)
    additive = StepSpanCollator(mote.tokens, 37, skip=Skip(), seed=3, additive=True)(rows)["attention_mask"]
    assert torch.equal(additive == 0, first["attention_mask"])


def test_what_cannot_be_masked_is_refused():
    check_attention("sdpa")
    with pytest.raises(UsageError, match="cannot keep one step from reading another"):
        check_attention("flash_attention_2")
    with pytest.raises(UsageError, match="a rate is a chance"):
        Skip(rate=1.5)
    with pytest.raises(UsageError, match="skip mode"):
        Skip(mode="some")
