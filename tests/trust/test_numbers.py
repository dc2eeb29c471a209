# SPDX-License-Identifier: Apache-2.0
"""The layer's numbers: derivatives, closed forms, drawn routers and banks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.mixture import (
    LinearScore,
    ModuleBank,
    Router,
    Routing,
    TopK,
    balance_loss,
    entropy,
    hard_load_importance,
    importance_loss,
    prob,
    renormalised,
    router_z_loss,
)  # fmt: skip
from anabranch.testing import check_bank, check_router

LOSSES = (balance_loss, entropy, importance_loss, router_z_loss, hard_load_importance)


def routing_of(logits_TE, selected_TK):
    scores = logits_TE.softmax(-1)
    return Routing(logits_TE, scores, selected_TK, scores.gather(1, selected_TK), "token", len(logits_TE))


@pytest.mark.row("N1")
@pytest.mark.parametrize("loss", LOSSES[:4], ids=lambda loss: loss.__name__)
def test_derivatives_of_the_losses(loss, counted):
    tried = 0
    for seed in range(5):
        logits = torch.randn(
            6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True
        )
        selected = logits.detach().topk(2).indices
        assert torch.autograd.gradcheck(lambda x, chosen=selected: loss(routing_of(x, chosen)), (logits,))
        tried += 1
    detached = torch.autograd.gradcheck(
        lambda x: x.square().sum() + (x.detach() ** 3).sum() * 2, (logits,), raise_exception=False
    )
    counted(tried, control=(int(not detached), "wrong derivative on purpose is noticed"))


@pytest.mark.row("N2")
def test_closed_forms_of_the_balance_and_z_loss(counted):
    wrong, tried, theirs = [], 0, 0
    for E, K in [(e, k) for e in (2, 3, 4, 8, 16) for k in (1, 2, 3, 4) if k <= e]:
        T = 4 * E
        spread = torch.stack([(torch.arange(T) * K + j) % E for j in range(K)], 1)
        uniform = balance_loss(routing_of(torch.zeros(T, E), spread)).item()
        peaked = torch.full((T, E), -60.0)
        peaked[:, :K] = 0.0
        collapsed = balance_loss(routing_of(peaked, torch.arange(K).expand(T, K))).item()
        c = 0.5
        z = router_z_loss(routing_of(torch.full((T, E), c), spread)).item()
        for found, expected in ((uniform, 1), (collapsed, E / K), (z, (c + torch.tensor(float(E)).log().item()) ** 2)):
            tried += 1
            # float32: a sum of at most 64 rows, each within 6e-8 of its value, and a square near 10
            wrong += [] if abs(found - expected) <= 1e-5 else [(E, K, found, expected)]
        share_KE = torch.nn.functional.one_hot(spread, E).float().mean(0)  # the formula of transformers: a share a slot
        theirs += abs(E * (share_KE * torch.full((T, E), 1 / E).mean(0)).sum().item() - 1) > 1e-5
    assert wrong == []
    counted(tried, len(wrong), control=(theirs, "of them are not 1 by the formula that sums over K"))


@pytest.mark.row("N4")
def test_drawn_routers_keep_their_contract(counted):
    ran = []

    @settings(max_examples=60, deadline=None, database=None)
    @given(
        E=st.integers(2, 9),
        K=st.integers(1, 4),
        seed=st.integers(0, 2**31 - 1),
        weigh=st.sampled_from([prob, renormalised]),
    )
    def draw(E, K, seed, weigh):
        score = LinearScore(8, E, generator=torch.Generator().manual_seed(seed))
        check_router(lambda: Router(score, select=TopK(min(K, E)), weigh=weigh), seed=seed % 1000)
        ran.append(E)

    draw()
    counted(len(ran))


@pytest.mark.row("N5")
def test_drawn_sequences_on_a_bank_come_back_bit_for_bit(counted):
    ran = []

    @settings(max_examples=40, deadline=None, database=None)
    @given(steps=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0, 2**31 - 1))
    def draw(steps, seed):
        g = torch.Generator().manual_seed(seed)
        bank = ModuleBank.from_template(nn.Linear(4, 4), num_experts=4, noise=0.1, generator=g)
        rows = torch.randn(6, 4, generator=g)
        expected = [bank.run(e, rows) for e in range(4)]
        for step in steps:
            order = torch.randperm(bank.num_experts, generator=g).tolist()
            if step == 0:
                bank, expected = bank.permute(order), [expected[e] for e in order]
            elif step == 1:
                bank, expected = bank.take(order[:3]), [expected[e] for e in order[:3]]
            elif step == 2:
                bank, expected = bank.grow([0], noise=0.0, generator=g), [*expected, expected[0]]
            else:
                bank, expected = bank.merge(torch.eye(bank.num_experts)[order]), [expected[e] for e in order]
            assert all(torch.equal(bank.run(e, rows), y) for e, y in enumerate(expected)), step
        ran.append(len(steps))

    draw()
    counted(sum(ran))


@pytest.mark.row("N5")
def test_a_drawn_bank_keeps_its_contract():
    g = torch.Generator().manual_seed(0)
    check_bank(
        lambda: ModuleBank.from_template(
            nn.Linear(4, 4), num_experts=4, noise=0.1, generator=torch.Generator().manual_seed(1)
        ),
        torch.randn(9, 4, generator=g),
    )
