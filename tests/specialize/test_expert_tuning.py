# SPDX-License-Identifier: Apache-2.0
"""The loss of next tokens and the training that methods of choosing experts share."""

import itertools
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from anabranch.errors import AnabranchError, CheckFailed, Stopped, UsageError
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.families import tiny
from anabranch.specialize.chosen_experts import ChosenExperts
from anabranch.specialize.expert_tuning import (
    Given,
    Kept,
    NextTokens,
    Training,
    by_layer,
    digest_by_slice,
    loop_config,
    next_token_loss,
    rows_of,
    touched,
    tune,
)
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.optimizer import build_optimizer
from tests.many import load, read_all, run_many

WORKER = Path(__file__).with_name("tuning_worker.py")


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


# on the common loop


class UntilStopped:
    """A stream in whose fourth batch somebody asks the process to end."""

    def __init__(self, batches):
        self.batches = batches

    def batch(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return rows_of(self.batches[step])


def test_a_stopped_training_goes_on_bit_for_bit_and_keeps_the_chosen_alone(tmp_path):
    worker = load(WORKER)
    batches, config = worker.batches(6), Training(steps=6, learning_rate=1e-2)
    whole, model = tiny("GptOss"), tiny("GptOss")
    losses = tune(whole, worker.EXPERTS, batches, config).losses
    with pytest.raises(Stopped, match="after step 4 of 6; its checkpoint is complete"):
        tune(tiny("GptOss"), worker.EXPERTS, UntilStopped(batches), config, kept=Kept(folder=tmp_path))
    held = load_checkpoint(tmp_path).checkpoint
    per_expert = sum(value[0].numel() for name, value in model.named_parameters() if ".layers.0.mlp.experts." in name)
    assert sum(value.numel() for value in held.model.values()) == 4 * per_expert
    moments = [value for name, value in held.optimizer.items() if not name.startswith("step/")]
    assert sum(value.numel() for value in moments) == 2 * 4 * per_expert
    again = tune(model, worker.EXPERTS, batches, config, kept=Kept(folder=tmp_path, resume=True))
    assert again.losses == losses[4:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_rows_that_fill_a_shorter_batch_up_count_in_nothing():
    ids = torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(0))
    short, long = batch_of(ids[:2]), batch_of(ids)
    plain, filled = [Given([short]), Given([short, long])]
    assert len(filled.batch(0)["learnt"]) == len(plain.batch(0)["learnt"]) + 1
    plain, filled = [tune(tiny("Mixtral"), {"model.layers.1.mlp": [3]}, s, Training(steps=1)) for s in (plain, filled)]
    assert filled.losses == pytest.approx(plain.losses, abs=1e-6)
    for name, value in plain.adapter.tensors.items():
        torch.testing.assert_close(filled.adapter.tensors[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("precision", "rounding"), [(torch.bfloat16, 0.03), (torch.float16, 0.003)])
def test_losses_of_a_model_in_half_precision_fall_as_they_do_in_float32(precision, rounding):
    """Steps of this rate are below the rounding of most weights, and would be lost in them. What is left is rounding
    in the forward pass: over six draws of ids at most .012 and .0011 of the fall."""
    ids = torch.randint(3, 97, (4, 8), generator=torch.Generator().manual_seed(0))
    batches, falls = [batch_of(ids)] * 30, {}
    for kind in (precision, torch.float32):
        losses = tune(tiny("Mixtral").to(precision).to(kind), {"model.layers.1.mlp": [1, 3]}, batches,
                      Training(steps=30, learning_rate=1e-3)).losses  # fmt: skip
        falls[kind] = losses[0] - losses[-1]
    assert falls[torch.float32] > 0.01
    assert falls[precision] == pytest.approx(falls[torch.float32], rel=rounding)


def test_adapters_by_names_of_modules_miss_stacked_experts_and_slices_reach_them():
    """PEFT has conversions for some families; in the others an adapter on all linear layers trains no expert."""
    adapted = get_peft_model(tiny("GptOss"), LoraConfig(r=2, target_modules="all-linear"))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(".self_attn." in name for name in trained)
    assert not any(".experts." in name for name in trained)
    chosen = ChosenExperts(tiny("GptOss"), {"model.layers.1.mlp": [3]})
    stacked = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert set(chosen.touches()) == {f"model.layers.1.mlp.experts.{name}" for name in stacked}


def test_a_slice_that_is_as_before_and_one_that_is_not_are_told_by_name():
    model = tiny("Mixtral")
    before = digest_by_slice(model)
    experts = {"model.layers.1.mlp": [1, 3]}
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] += 1
    with pytest.raises(CheckFailed, match=r"model.layers.1.mlp.experts.\*.1' was to change"):
        touched(before, digest_by_slice(model), experts)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[1] += 1
    report = touched(before, digest_by_slice(model), experts)
    assert report.changed == ("model.layers.1.mlp.experts.down_proj.1", "model.layers.1.mlp.experts.down_proj.3")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[0, 0, 0] += 1
    with pytest.raises(CheckFailed, match=r"received: model.layers.2.mlp.experts.gate_up_proj.0"):
        touched(before, digest_by_slice(model), experts)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_learn_what_one_does_with_copies_and_with_parts(world, tmp_path):
    """Of three processes the parts are uneven: eight experts are three, three and two."""
    worker = load(WORKER)
    codes, said = run_many(world, WORKER, tmp_path)
    assert codes == [0] * world, said
    ranks = read_all(tmp_path, "losses", world)
    assert all(losses == ranks[0] for losses in ranks)
    for family, dtype in worker.CASES.items():
        model, losses = worker.tuned(family)
        copies, parts = (load_file(tmp_path / f"{family}.{sharding}") for sharding in ("none", "full"))
        for key, value in model.state_dict().items():
            torch.testing.assert_close(copies[key], parts[key], atol=2e-5, rtol=0, msg=f"{family} {key}")
            if dtype == torch.float32:  # what half precision rounds differs with the number of rows
                torch.testing.assert_close(copies[key], value, atol=2e-5, rtol=0, msg=f"{family} {key}")
        for sharding in ("none", "full"):
            expected = pytest.approx(losses, abs=1e-5 if dtype == torch.float32 else 1e-2)
            assert ranks[0][f"{family}.{sharding}"] == expected
    frozen_stay(tiny("Qwen2-MoE"), load_file(tmp_path / "Qwen2-MoE.full"), worker.EXPERTS)
    frozen_stay(tiny("GptOss").to(torch.bfloat16), load_file(tmp_path / "GptOss.none"), worker.EXPERTS)


def frozen_stay(base, found, experts):
    """Bit for bit, under weight decay; every chosen expert moved."""
    before = digest_by_slice(base)
    base.load_state_dict(found)
    after = {name: before[name] if ".shared_expert." in name else now for name, now in digest_by_slice(base).items()}
    assert touched(before, after, experts).changed
