# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking.batches import Batch, next_token_losses, read_stats
from anabranch.models.mixtures.families import FAMILIES, tiny
from tests.measure.experts.planted import LABELS, documents, world


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), asked=st.booleans(), left=st.booleans())
def test_the_loss_equals_the_slow_loop_with_padding_on_either_side(seed, asked, left):
    g = torch.Generator().manual_seed(seed)
    ids, logits = torch.randint(0, 9, (3, 6), generator=g), torch.randn(3, 6, 9, generator=g)
    mask = (torch.arange(6) < torch.randint(1, 7, (3, 1), generator=g)).long()
    mask = mask.flip(1) if left else mask
    answers = torch.rand(3, 6, generator=g) < 0.5 if asked else None
    losses = next_token_losses(logits, Batch(ids, mask, torch.zeros_like(ids), torch.zeros(3).long(), answers))
    for b in range(3):
        terms = [
            -float(logits[b, s - 1].log_softmax(-1)[ids[b, s]])
            for s in range(1, 6)
            if mask[b, s] and mask[b, s - 1] and (answers is None or answers[b, s])
        ]
        assert float(losses[b]) == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_read_in_evaluation_mode_and_left_in_its_own(family):
    model, batch = tiny(family).train(), documents(torch.Generator().manual_seed(0), count=4, length=6)
    state = torch.get_rng_state()
    once, again = (read_stats(model, [batch], LABELS) for _ in range(2))
    assert torch.equal(once["logit"], again["logit"])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_batches():
    ids = torch.zeros(2, 3).long()
    with pytest.raises(UsageError, match=r"whose labels do not fit\n  expected: \(2, 3\)\n  received: \(2, 1\)"):
        Batch(ids, ids, ids[:, :1], ids[:, 0])
    with pytest.raises(UsageError, match="whose folds do not fit"):
        Batch(ids, ids, ids, ids)
    made = world(0)
    with pytest.raises(UsageError, match="nothing to read"):
        read_stats(made.model, [], LABELS)
    with pytest.raises(UsageError, match="no such label"):
        read_stats(made.model, made.batches, LABELS[:1])
