# SPDX-License-Identifier: Apache-2.0
import random
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from anabranch.errors import AnabranchError, UsageError
from anabranch.train.checkpoint import checkpoint_steps, load_checkpoint
from anabranch.train.loop import TrainConfig, local_rows, train
from anabranch.train.metrics import read_metrics
from anabranch.train.optimizer import build_optimizer, learning_rate


def config(**changes):
    return TrainConfig(**({"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3} | changes))


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_loop_is_the_plain_loop_and_nothing_else(tiny):
    """No dropout: then no generator is involved and a loop written out must give the same bits."""
    objective, plain = tiny.TinyObjective(dropout=0.0), tiny.TinyObjective(dropout=0.0)
    result = train(objective, tiny.TinyStream(), config(max_grad_norm=0.5))
    optimizer = build_optimizer(plain, config())
    losses = []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(step, config())
        optimizer.zero_grad()
        loss = plain(tiny.TinyStream().batch(step))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5, foreach=True)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == losses
    assert differing(state_of(objective), state_of(plain)) == set()
    assert (result.step, result.images_seen) == (12, 96)
    assert losses[-1] < losses[0]


def test_what_has_no_gradient_is_left_alone_to_the_bit(tiny):
    objective = tiny.TinyObjective()
    before = state_of(objective)
    train(objective, tiny.TinyStream(), config(weight_decay=0.5))
    unchanged = before.keys() - differing(before, state_of(objective))
    assert unchanged == {"unused.weight", "unused.bias", "frozen"}
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert objective.rows_seen == 96


def test_the_callers_generators_and_settings_are_as_before(tiny):
    def look():
        settings = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
        handler = signal.getsignal(signal.SIGTERM)
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), settings, handler

    before = look()
    train(tiny.TinyObjective(), tiny.TinyStream(), config())
    assert look() == before


def test_the_seed_decides_and_the_callers_generator_does_not(tiny):
    losses = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            losses.append(train(tiny.TinyObjective(), tiny.TinyStream(), config(seed=seed)).losses)
    assert losses[0] == losses[1] != losses[2]


def test_without_a_run_nothing_is_written_and_with_one_everything_is(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny.TinyObjective(), tiny.TinyStream(), config())
    assert list(tmp_path.iterdir()) == []
    lines, steps = [], []
    result = train(
        tiny.TinyObjective(),
        tiny.TinyStream(),
        config(save_every=5, log_every=4),
        tmp_path / "run",
        on_step=lambda step, logs: steps.append((step, sorted(logs))),
        report=lines.append,
    )
    assert checkpoint_steps(tmp_path / "run") == [10, 12]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [4, 8, 12]
    assert metrics[1]["loss"] == pytest.approx(sum(result.losses[4:8]) / 4, rel=1e-6)
    assert metrics[1].keys() == {"step", "loss", "grad_norm", "hidden_mean", "learning_rate", "images_per_second"}
    assert [step for step, _ in steps] == list(range(1, 13))
    assert steps[0][1] == ["grad_norm", "hidden_mean", "loss"]
    assert lines[0] == "starting at step 0"
    assert lines[1].startswith("step 4/12  loss ")


def test_an_evaluation_in_between_changes_nothing(tiny):
    objective = tiny.TinyObjective()

    def evaluate(step, logs):
        objective.eval()
        objective(tiny.TinyStream(seed=9).batch(0))

    plain = train(tiny.TinyObjective(), tiny.TinyStream(), config())
    assert train(objective, tiny.TinyStream(), config(), on_step=evaluate).losses == plain.losses


def test_bf16_trains_fp32_weights_and_leaves_the_objective_as_it_was(tiny):
    objective = tiny.TinyObjective(dropout=0.0)
    seen = []
    handle = objective.inner.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    result = train(objective, tiny.TinyStream(), config(steps=60, mixed_precision="bf16"))
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert "forward" not in vars(objective)


# Wrong use -----


def test_an_existing_run_is_not_trained_over(tiny, tmp_path):
    train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="already holds a run\n  try: --resume to go on, or another --out"):
        train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    again = train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path, resume=True)
    assert (again.step, again.losses) == (12, [])


def test_resuming_with_another_configuration_or_model_is_refused(tiny, tmp_path):
    train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path)
    with pytest.raises(UsageError, match="expected: seed: 0; steps: 12\n  received: seed: 1; steps: 20"):
        train(tiny.TinyObjective(), tiny.TinyStream(), config(steps=20, seed=1), tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"of another model\n  received: differing tensors: norm.num_batches_tracked"):
        train(tiny.TinyObjective(batch_norm=False), tiny.TinyStream(), config(), tmp_path, resume=True)
    train(tiny.TinyObjective(), tiny.TinyStream(), config(save_every=1, log_every=1), tmp_path, resume=True)


def test_two_trainings_do_not_share_a_run(tiny, tmp_path):
    def second(step, logs):
        train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path, resume=True)

    with pytest.raises(UsageError, match="is in use by process"):
        train(tiny.TinyObjective(), tiny.TinyStream(), config(), tmp_path, on_step=second)


def test_a_batch_of_the_wrong_size_is_named(tiny):
    with pytest.raises(
        AnabranchError, match=r"'x' has the wrong number of rows\n  expected: 8 .*\n  received: \(4, 6\)"
    ):
        train(tiny.TinyObjective(), tiny.TinyStream(batch_size=4), config())


def test_rows_are_shared_out_in_order_without_overlap():
    batch = {"x": torch.arange(12), "y": torch.arange(24).reshape(12, 2)}
    for world in (1, 2, 3, 4):
        shares = [local_rows(batch, 12, rank, world) for rank in range(world)]
        assert all(torch.equal(torch.cat([share[name] for share in shares]), batch[name]) for name in batch)


def test_an_exception_in_the_middle_leaves_the_checkpoints_before_it(tiny, tmp_path):
    def fail(step, logs):
        if step == 9:
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        train(tiny.TinyObjective(), tiny.TinyStream(), config(save_every=4), tmp_path, on_step=fail)
    assert load_checkpoint(tmp_path).checkpoint.step == 8


# Numbers that are not finite -----


class BadBatch:
    def __init__(self, stream, step, value):
        self.stream, self.step, self.value = stream, step, value

    def batch(self, step):
        batch = self.stream.batch(step)
        if step == self.step:
            batch["x"][2, 3] = self.value
        return batch


class Overflow(nn.Module):
    """Finite until the input is large; the derivative of the root is infinite where the input is zero."""

    def __init__(self, objective, function):
        super().__init__()
        self.objective, self.function, self.scale = objective, function, nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.objective(batch)["loss"] + self.function(self.scale, batch["x"])}


CASES = {
    "batch": (float("nan"), lambda scale, x: 0 * scale, "the batch entry 'x'"),
    "module": (1e4, lambda scale, x: scale * (x.abs().max() ** 12).clamp(max=float("inf")), "the output of the module"),
    "gradient": (1e4, lambda scale, x: ((scale - 1).abs() + (x.max() < 1e3)).sqrt(), "the gradient of 'scale'"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_is_not_applied(tiny, tmp_path, case):
    value, function, cause = CASES[case]
    stream = BadBatch(tiny.TinyStream(), 6, value)
    objective = Overflow(tiny.TinyObjective(), function)
    states = []
    with pytest.raises(AnabranchError, match=rf"step 7: the loss or its gradient is not finite(.|\n)*{cause}") as error:
        train(
            objective,
            stream,
            config(save_every=3, learning_rate=1e-9),
            tmp_path,
            on_step=lambda step, logs: states.append(state_of(objective)),
        )
    parameters = {name for name, _ in objective.named_parameters()}
    assert not differing(states[-1], state_of(objective)) & parameters
    assert len(states) == load_checkpoint(tmp_path).checkpoint.step == 6
    replay = load_file(tmp_path / "replay-step-7.safetensors")
    assert torch.equal(replay["x"].nan_to_num(), stream.batch(6)["x"].nan_to_num())
    assert str(tmp_path / "replay-step-7.safetensors") in str(error.value)


def test_a_parameter_that_was_broken_before_is_named(tiny):
    objective = tiny.TinyObjective()
    with torch.no_grad():
        objective.outer.weight[0, 0] = float("inf")
    with pytest.raises(AnabranchError, match=r"step 1: (.|\n)*the parameter 'outer.weight', before this step"):
        train(objective, tiny.TinyStream(), config())


class Held(nn.Module):
    """What computes is held beside torch's own registers, as a frozen model is whose weights no checkpoint has."""

    def __init__(self, objective, model):
        super().__init__()
        self.objective, self.held = objective, (model,)

    def computing(self):
        return [*self.held, self.objective]

    def forward(self, batch):
        return {"loss": self.objective(batch)["loss"] + 0 * self.held[0](batch["x"]).sum()}


class Divided(nn.Module):
    def forward(self, x):
        return x / 0


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (nn.Sequential(nn.Identity(), Divided()), "the output of the module '1'"),
        (nn.Sequential(nn.LazyLinear(2)), "the parameter '0.weight', before this step"),
    ],
    ids=["module", "parameter"],
)
def test_a_place_in_a_model_that_is_held_is_named(tiny, broken, cause):
    stream = tiny.TinyStream()
    with torch.no_grad():
        broken(stream.batch(0)["x"])
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    broken.requires_grad_(False)
    with pytest.raises(AnabranchError, match=rf"step 1: (.|\n)*{cause}"):
        train(Held(tiny.TinyObjective(), broken), stream, config())
