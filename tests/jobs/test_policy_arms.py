# SPDX-License-Identifier: Apache-2.0
"""The arms of PolicyWorld run on the same rows from the same start; what must be seen of them."""

import pytest

from anabranch.jobs.policy_arms import ARMS, Bench, evaluate, measure, train_arm
from anabranch.specialize.mote.collate import StepSpanCollator
from anabranch.specialize.mote.mote import ChainLoss

SMALL = {"seed": 1, "steps": 3, "batch_size": 8, "base_steps": 20}


@pytest.fixture(scope="module")
def bench():
    return Bench(**SMALL)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_is_measured_in_every_mode(name, bench):
    trained = train_arm(bench, ARMS[name])
    found = evaluate(bench, trained.mote)
    assert set(found) == {"full", "nll", "direct", "short", "adaptive", "jailbreak"}
    assert found["direct"]["tokens"] <= 10
    assert 6 <= found["full"]["tokens"] <= 30
    assert all(0 <= value <= 1 for key, value in found["full"].items() if key != "tokens")
    assert len(trained.losses) == 3


def test_all_arms_on_whole_chains_start_from_the_same_loss(bench):
    """B = 0: before the first step every arm is the base model."""
    losses = {}
    for name, arm in ARMS.items():
        if arm.chains == "full":
            mote = train_arm(Bench(**(SMALL | {"steps": 1})), arm, learning_rate=1e-9).mote
            batch = StepSpanCollator(mote.tokens, 0)(bench.rows(mote, bench.questions[1]))
            losses[name] = float(ChainLoss(mote).eval()(batch)["loss"].detach())
    assert max(losses.values()) - min(losses.values()) < 1e-4


def test_a_perfect_model_gets_everything_right_and_the_base_nothing(bench, monkeypatch):
    from anabranch.data.policy_world import chain
    from anabranch.jobs import policy_arms
    from anabranch.specialize.mote.generate import Chain

    truth = [Chain(texts=chain(bench.world, q), tokens=[0] * 21) for q in bench.questions[1]]
    monkeypatch.setattr(policy_arms, "generate", lambda *args, **kwargs: truth)
    mote = train_arm(bench, ARMS["MoTE"]).mote
    found = measure(bench, mote)
    assert {found[k] for k in ("exact", "whole_chain", "harmless", "right_alternative", "helpful")} == {1.0}
    assert found["malformed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_the_ids_of_steps_matter(seed):
    """300 steps, before everything is at the ceiling: drawn ids are far behind the steps' own."""
    here = Bench(seed=seed, steps=300)
    exact = {name: measure(here, train_arm(here, ARMS[name]).mote)["exact"] for name in ("MoTE", "random ids")}
    assert exact["MoTE"] > exact["random ids"] + 0.4
