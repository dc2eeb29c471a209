# SPDX-License-Identifier: Apache-2.0
"""The arms of PolicyWorld run on the same rows from the same start; what must be seen of them."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.jobs.align.policy_arms import ARMS, Bench, evaluate, fresh, measure, nlls, train_arm
from anabranch.specialize.mote.collate import StepSpanCollator
from anabranch.specialize.mote.folder import save
from anabranch.specialize.mote.mote import ChainLoss
from anabranch.specialize.mote.steps import QUESTION

SMALL = {"seed": 1, "steps": 3, "batch_size": 8, "base_steps": 20, "num_items": 16}


@pytest.fixture(scope="module")
def bench():
    return Bench(**SMALL)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_is_measured_in_every_mode(name, bench):
    arm = ARMS[name]
    trained = train_arm(bench, arm)
    found = evaluate(bench, trained)
    told = {"full", "nll", "direct", "short", "jailbreak"} | ({"adaptive"} if arm.kind != "separate" else set())
    assert set(found) - {"by_requests"} == told
    assert ("by_requests" in found) == (arm.kind == "mixture" and arm.config.get("assign", "step") == "step")
    assert found["direct"]["tokens"] <= 10
    assert 6 <= found["full"]["tokens"] <= 30
    assert all(0 <= value <= 1 for key, value in found["full"].items() if key != "tokens")
    assert len(trained.losses) == (0 if arm.kind == "prompt" else 3)


def test_every_separate_adapter_learns_its_own_step_alone(bench):
    trained = train_arm(Bench(**(SMALL | {"steps": 40})), ARMS["separate adapters"])
    told = {name: nlls(bench, mote) for name, mote in trained.separate.items()}
    for step in told:
        assert min(told, key=lambda name: told[name][step]) == step  # nobody is better at it


def test_a_mixture_with_gates_is_not_saved_without_them(bench, tmp_path):
    with pytest.raises(UsageError, match="would be lost"):
        save(fresh(bench, ARMS["gate of tokens, top 2 of 4"]), tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


def test_clusters_see_nothing_but_the_question(bench):
    """The words of a chain, and padding, change no cluster."""
    mote = fresh(bench, ARMS["MoCLE"])
    rows = bench.rows(mote, bench.questions[0][:20])
    batch = StepSpanCollator(mote.tokens, 0, question=None)(rows)
    whole = mote.context_ids(batch["input_ids"], batch["step_ids"])["cluster"]
    asked = [row.input_ids[: row.step_spans[0].start] for row in rows]
    alone = [mote.context_ids(torch.tensor([ids]), torch.full((1, len(ids)), QUESTION))["cluster"] for ids in asked]
    assert whole.tolist() == torch.cat(alone).tolist()
    assert len(set(whole.tolist())) > 1


def test_all_arms_on_whole_chains_start_from_the_same_loss(bench):
    """B = 0: before the first step every arm is the base model."""
    losses = {}
    for name, arm in ARMS.items():
        if arm.chains == "full" and arm.kind not in ("prompt", "separate"):
            mote = train_arm(Bench(**(SMALL | {"steps": 1})), arm, learning_rate=1e-9).mote
            batch = StepSpanCollator(mote.tokens, 0)(bench.rows(mote, bench.questions[1]))
            losses[name] = float(ChainLoss(mote).eval()(batch)["loss"].detach())
    assert max(losses.values()) - min(losses.values()) < 1e-4


def test_a_perfect_model_gets_everything_right_and_the_base_nothing(bench, monkeypatch):
    from anabranch.data.policy_world import chain
    from anabranch.jobs.align import policy_arms
    from anabranch.specialize.mote.generate import Chain

    truth = [Chain(texts=chain(bench.world, q), tokens=[0] * 21) for q in bench.questions[1]]
    monkeypatch.setattr(policy_arms, "generate", lambda *args, **kwargs: truth)
    found = measure(bench, train_arm(bench, ARMS["MoTE"]))
    assert {found[k] for k in ("exact", "whole_chain", "harmless", "right_alternative", "helpful")} == {1.0}
    assert found["malformed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_the_ids_of_steps_matter(seed):
    """300 steps, before everything is at the ceiling: drawn ids are far behind the steps' own."""
    here = Bench(seed=seed, steps=300, num_items=32)
    exact = {name: measure(here, train_arm(here, ARMS[name]))["exact"] for name in ("MoTE", "random ids")}
    assert exact["MoTE"] > exact["random ids"] + 0.4
