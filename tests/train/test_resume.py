# SPDX-License-Identifier: Apache-2.0
"""A resumed run is the uninterrupted run: every tensor, every statistic, every line, from every step."""

import contextlib
import signal
from dataclasses import asdict

import pytest
import torch

from anabranch.errors import Stopped
from anabranch.train import loop
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.metrics import read_metrics
from anabranch.train.run_folder import RunFolder

STEPS = 32
CONFIG = TrainConfig(
    steps=STEPS, batch_size=8, learning_rate=1e-2, warmup_steps=7, weight_decay=0.1, save_every=10, log_every=5
)


def stop_at(step_to_stop):
    def on_step(step, logs):
        if step == step_to_stop:
            signal.raise_signal(signal.SIGTERM)

    return on_step


def final_tensors(run):
    checkpoint = load_checkpoint(run).checkpoint
    assert checkpoint.step == STEPS
    return {**checkpoint.model, **checkpoint.optimizer}


def lines_without_speed(run):
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupt_and_resume(tiny, run, stopped_step):
    """The signal comes after a step and is obeyed after the next one."""
    if stopped_step > 1:
        with pytest.raises(Stopped, match=f"after step {stopped_step} of {STEPS}; its checkpoint is complete"):
            train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run, on_step=stop_at(stopped_step - 1))
        assert load_checkpoint(run).checkpoint.step == stopped_step
    train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run, resume=True)
    return final_tensors(run)


@pytest.mark.row("R4")
def test_resuming_from_each_of_31_steps_is_bitwise_the_uninterrupted_run(tiny, tmp_path, counted):
    train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "whole")
    whole, lines = final_tensors(tmp_path / "whole"), lines_without_speed(tmp_path / "whole")
    assert {"norm.running_var", "rows_seen", "exp_avg_sq/outer.weight", "step/inner.bias"} <= whole.keys()
    differ = []
    for stopped_step in range(1, STEPS + 1):
        run = tmp_path / f"stopped-{stopped_step}"
        same = equal(interrupt_and_resume(tiny, run, stopped_step), whole) and lines_without_speed(run) == lines
        differ += [] if same else [stopped_step]
    counted(STEPS - 1, len(differ))  # the one of step 1 was not stopped: it only starts with resume


@pytest.mark.row("R4")
def test_without_a_seed_for_each_step_a_resumed_run_differs(tiny, tmp_path, monkeypatch, counted):
    """The control: the comparison above notices when the generators go on from wherever they are."""
    monkeypatch.setattr(loop, "seeded", lambda seed, device: contextlib.nullcontext())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "whole")
        whole = final_tensors(tmp_path / "whole")
        same = []
        for stopped_step in (2, 9, 16, 23, 30):
            torch.manual_seed(0)
            run = tmp_path / f"stopped-{stopped_step}"
            with pytest.raises(Stopped):
                train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run, on_step=stop_at(stopped_step - 1))
            torch.manual_seed(0)  # a new process
            train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run, resume=True)
            same.append(equal(final_tensors(run), whole))
    counted(0, control=(same.count(False), "of 5 differ without a seed for each step (R5)"), least=5)


@pytest.mark.row("R4")
def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(tiny, tmp_path):
    train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "run", on_step=stop_at(26))
    (tmp_path / "run" / "checkpoints" / "step-000027" / "optimizer.safetensors").write_bytes(b"rot")
    lines = []
    train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "run", resume=True, report=lines.append)
    assert lines[:2] == [
        "skipped step-000027: optimizer.safetensors: 3 bytes, the manifest says "
        f"{(tmp_path / 'whole' / 'checkpoints' / 'step-000030' / 'optimizer.safetensors').stat().st_size}",
        "resumed from step-000020",
    ]
    assert equal(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))
    assert lines_without_speed(tmp_path / "run") == lines_without_speed(tmp_path / "whole")


def test_a_run_that_never_saved_resumes_at_step_0(tiny, tmp_path):
    def fail(step, logs):
        raise RuntimeError("no power")

    with RunFolder.open(tmp_path / "run", asdict(CONFIG)) as run, pytest.raises(RuntimeError):
        train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run.path, on_step=fail)
    lines = []
    with RunFolder.open(tmp_path / "run", asdict(CONFIG), resume=True) as run:
        train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, run.path, resume=True, report=lines.append)
    assert lines[0] == "starting at step 0"
    train(tiny.TinyObjective(), tiny.TinyStream(), CONFIG, tmp_path / "whole")
    assert equal(final_tensors(run.path), final_tensors(tmp_path / "whole"))
    assert lines_without_speed(run.path) == lines_without_speed(tmp_path / "whole")


@pytest.mark.row("R6", sample=True)
def test_sigterm_leaves_a_finished_checkpoint_and_exit_code_75(start_worker, tmp_path):
    process = start_worker("train_worker.py", "until-stopped", tmp_path)
    while (line := process.stdout.readline().strip()) != "3":
        assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped on request after step" in out
    assert "try: the same command with --resume" in out
    last_step = max(int(line) for line in out.splitlines() if line.isdigit())
    assert load_checkpoint(tmp_path).checkpoint.step == last_step
