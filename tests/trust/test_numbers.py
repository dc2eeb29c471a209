# SPDX-License-Identifier: Apache-2.0
"""The layer's numbers: derivatives, closed forms, drawn routers and banks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.mixture import (
    ExpertBank,
    GateNoise,
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
    shapes = [(e, k) for e in (2, 3, 4, 8, 16) for k in (1, 2, 3, 4) if k <= e]
    for E, K in shapes:
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
    several = sum(K > 1 for _, K in shapes)
    counted(tried, len(wrong), control=(theirs, "of them are not 1 by the formula that sums over K"), least=several)


def sizes(row, few, many):
    """A sample with the fast ones, all of it with the slow ones."""
    return [
        pytest.param(few, marks=pytest.mark.row(row, sample=True)),
        pytest.param(many, marks=[pytest.mark.row(row, cheap=True), pytest.mark.slow]),
    ]


@pytest.mark.parametrize("examples", sizes("N4", 60, 500))
def test_drawn_routers_keep_their_contract(examples, counted):
    ran = []

    @settings(max_examples=examples, deadline=None, database=None)
    @given(
        E=st.integers(2, 9),
        K=st.integers(1, 4),
        seed=st.integers(0, 2**31 - 1),
        weigh=st.sampled_from([prob, renormalised]),
        noise=st.booleans(),
    )
    def draw(E, K, seed, weigh, noise):
        score = LinearScore(8, E, generator=torch.Generator().manual_seed(seed))
        adjust = [GateNoise()] if noise else []
        check_router(lambda: Router(score, adjust=adjust, select=TopK(min(K, E)), weigh=weigh), seed=seed % 1000)
        ran.append(E)

    draw()
    counted(len(ran))


class ByTheBatch(LinearScore):
    def forward(self, hidden_states):
        logits_BNE = super().forward(hidden_states)
        return logits_BNE - logits_BNE.mean(0) * torch.arange(self.num_experts)


class ByThePadding(LinearScore):
    def forward(self, hidden_states):
        logits_BNE = super().forward(hidden_states)
        return logits_BNE - logits_BNE.mean(1, keepdim=True) * torch.arange(self.num_experts)


class ByThePlace(LinearScore):
    """Experts have a rank of their own, which does not go with them."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + torch.arange(self.num_experts) / self.num_experts


class Low(LinearScore):
    def forward(self, hidden_states):
        return super().forward(hidden_states).bfloat16()


class Unsteady(LinearScore):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1e-3 * torch.randn(self.num_experts)


class Stuck(LinearScore):
    def take(self, experts):
        return LinearScore.take(self, sorted(experts))


class Twice(TopK):
    def forward(self, router_logits):
        return router_logits.argmax(-1, keepdim=True).expand(-1, self.top_k)


class FromAnywhere(GateNoise):
    """Noise of the global generator."""

    def forward(self, router_logits, draw):
        return router_logits.new_zeros(()) if draw is None else torch.randn_like(router_logits)


def of_score(kind):
    return lambda: Router(kind(8, 4, generator=torch.Generator().manual_seed(0)), select=TopK(2), weigh=prob)


def of_parts(**parts):
    score = LinearScore(8, 4, generator=torch.Generator().manual_seed(0))
    return lambda: Router(score, **{"select": TopK(2), "weigh": prob} | parts)


def rejected(check, makers):
    found = 0
    for make in makers:
        try:
            check(make)
        except AssertionError:
            found += 1
    return found


@pytest.mark.row("N4")
def test_planted_faults_of_routers_are_found(counted):
    faulty = [of_score(kind) for kind in (ByTheBatch, ByThePadding, ByThePlace, Low, Unsteady, Stuck)]
    faulty += [of_parts(select=Twice(2)), of_parts(adjust=[FromAnywhere()])]
    assert rejected(check_router, [of_score(LinearScore), of_parts(adjust=[GateNoise()])]) == 0
    found = rejected(check_router, faulty)
    counted(0, control=(found, f"of {len(faulty)} routers with a planted fault are found"), least=len(faulty))


@pytest.mark.parametrize("examples", sizes("N5", 40, 300))
def test_drawn_sequences_on_a_bank_come_back_bit_for_bit(examples, counted):
    ran = []

    @settings(max_examples=examples, deadline=None, database=None)
    @given(steps=st.lists(st.integers(0, 5), min_size=1, max_size=7), seed=st.integers(0, 2**31 - 1))
    def draw(steps, seed):
        g = torch.Generator().manual_seed(seed)
        bank = ExpertBank.from_template(FeedForward(), num_experts=4, noise=0.1, generator=g)
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
            elif step == 3:  # from modules to four 3-D parameters, or back
                bank = bank.stacked() if isinstance(bank, ExpertBank) else bank.separate(FeedForward())
            elif step == 4 and len(order) > 2:
                bank, expected = bank.drop(order[:1]), [y for e, y in enumerate(expected) if e != order[0]]
            else:
                bank, expected = bank.merge(torch.eye(bank.num_experts)[order]), [expected[e] for e in order]
            assert bank.num_experts == len(expected)
            assert all(torch.equal(bank.run(e, rows), y) for e, y in enumerate(expected)), step
        ran.append(len(steps))

    draw()
    counted(sum(ran), note=f"in {len(ran)} sequences")


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, rows):
        return self.fc2(self.activation_fn(self.fc1(rows)))


def bank_of(kind):
    g = torch.Generator().manual_seed(1)
    return lambda: kind.from_template(nn.Linear(4, 4), num_experts=4, noise=0.1, generator=g)


class Misplacing(ModuleBank):
    def take(self, experts):
        return super().take([(expert + 1) % self.num_experts for expert in experts])


class Blurring(ModuleBank):
    def merge(self, weights):
        return super().merge(torch.full_like(weights, 1 / weights.shape[1]))


class Moving(ModuleBank):
    """Growing shakes the old experts too."""

    def grow(self, sources, *, noise, generator):
        grown = super().grow(sources, noise=noise, generator=generator)
        grown.perturb([0], noise, generator)
        return grown


class Copying(ModuleBank):
    def perturb(self, experts, noise, generator):
        if list(experts) == list(range(4)):
            super().perturb(experts, noise, generator)


class Unfrozen(ModuleBank):
    def freeze(self, experts):
        pass


@pytest.mark.row("N5")
def test_a_drawn_bank_keeps_its_contract_and_planted_faults_of_banks_are_found(counted):
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    check_bank(bank_of(ModuleBank), rows)
    faulty = (Misplacing, Blurring, Moving, Copying, Unfrozen)
    found = rejected(lambda make: check_bank(make, rows), [bank_of(kind) for kind in faulty])
    counted(1, control=(found, f"of {len(faulty)} banks with a planted fault are found"), least=len(faulty))
