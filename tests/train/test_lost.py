# SPDX-License-Identifier: Apache-2.0
"""A process that is lost ends the run of the others with an error, within a minute, and the run goes on from there."""

import sys
from pathlib import Path

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.train.checkpoint import checkpoint_steps, load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.processes import TIMEOUT, naming_the_lost, time_limit
from tests.many import run_rounds

WORKER = Path(__file__).with_name("lost_worker.py")
MINUTE = 60
CASES = [("none", "killed", "step"), ("full", "killed", "step"), ("none", "killed", "save"), ("full", "killed", "save")]
STOPPED = ("none", "stopped", "step")


def lost_and_resumed(world, cases, folder):
    """For every case the exit codes of a run that lost a process and of its resume; at last of undisturbed runs."""
    rounds = []
    for number, case in enumerate(cases):
        rounds += [[folder / str(number), *case], [folder / str(number), case[0]]]
    kinds = sorted({case[0] for case in cases})
    rounds += [[folder / kind, kind] for kind in kinds]
    codes, said = run_rounds(world, WORKER, rounds, seconds=MINUTE)
    assert codes[2 * len(cases) :] == [[0] * world] * len(kinds), said
    return codes, said


def check(codes, said, number, case, world, folder):
    sharding, _, when = case
    victim = 0 if sharding == "none" and when.startswith("save") else world - 1
    assert codes[2 * number][victim] == -9, said
    survivors = [code for rank, code in enumerate(codes[2 * number]) if rank != victim]
    assert survivors == [1] * (world - 1), said  # an error of their own, not the limit of this test
    assert codes[2 * number + 1] == [0] * world, said
    resumed, undisturbed = (load_checkpoint(folder / name).checkpoint for name in (str(number), sharding))
    for kind in ("model", "optimizer"):
        found, expected = getattr(resumed, kind), getattr(undisturbed, kind)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name  # bitwise


@pytest.mark.row("R11")
def test_the_others_end_with_an_error_and_the_run_goes_on_bit_for_bit(tmp_path, counted):
    cases = [*CASES, STOPPED]
    codes, said = lost_and_resumed(2, cases, tmp_path)
    for number, case in enumerate(cases):
        check(codes, said, number, case, 2, tmp_path)
    assert said.count("another process of this run was lost") == len(cases)
    assert f"processes that answer within 4 s ({TIMEOUT})" in said
    assert "the same command with --resume" in said
    assert "Traceback" not in said
    counted(len(cases))


@pytest.mark.row("R11", cheap=True)
@pytest.mark.slow
def test_of_four_processes_three_end_wherever_it_happens(tmp_path, counted):
    cases = [*CASES, STOPPED]
    codes, said = lost_and_resumed(4, cases, tmp_path)
    for number, case in enumerate(cases):
        check(codes, said, number, case, 4, tmp_path)
    assert said.count("another process of this run was lost") == 3 * len(cases)
    counted(len(cases))


@pytest.mark.slow
@pytest.mark.row("R11", cheap=True)
def test_wherever_one_of_two_is_killed(tmp_path, counted):
    """In each step and in each save, with copies of the model and with parts of it."""
    moments = [f"step-{step}" for step in range(1, 13)] + [f"save-{save}" for save in (1, 2, 3)]
    cases = [(sharding, "killed", when) for sharding in ("none", "full") for when in moments]
    codes, said = lost_and_resumed(2, cases, tmp_path)
    for number, case in enumerate(cases):
        check(codes, said, number, case, 2, tmp_path)
    counted(len(cases))


@pytest.mark.slow
@pytest.mark.row("R11", cheap=True)
def test_without_a_time_limit_the_others_would_wait_for_ever(tmp_path, counted):
    """The control: one is frozen, and the others wait as long as the library of the processes does."""
    codes, said = run_rounds(2, WORKER, [[tmp_path / "run", *STOPPED]], seconds=MINUTE, **{TIMEOUT: "1800"})
    assert checkpoint_steps(tmp_path / "run") == [5], said  # it came so far
    counted(0, control=(codes[0].count(-9) - 1, "of 1 waits until it is killed where there is no time limit"))


@pytest.mark.parametrize(
    ("world", "when"),
    [
        (2, "step"),
        *(pytest.param(w, when, marks=pytest.mark.slow) for w, when in ((2, "save"), (4, "step"), (4, "save"))),
    ],
)
def test_under_torchrun_the_launcher_ends_and_the_run_goes_on(start_worker, tiny, tmp_path, world, when):
    options = ["--standalone", f"--nproc_per_node={world}", "--no-python"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    process = start_worker("lost_worker.py", tmp_path, "full", "killed", when, launcher=launcher)
    out, err = process.communicate(timeout=2 * MINUTE)  # the start of torchrun is not counted in the promise
    assert process.returncode == 1, out + err
    assert checkpoint_steps(tmp_path) == [5]  # of the second one, half written, there is nothing
    config = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, save_every=5, log_every=4)
    lines = []
    objective = tiny.TinyObjective(dropout=0.3, batch_norm=False)
    train(objective, tiny.TinyStream(), config, tmp_path, resume=True, report=lines.append)
    assert lines[0] == "resumed from step-000005"


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(UsageError, match=f"{TIMEOUT} is no time limit"):
        time_limit()


def test_an_error_of_the_model_is_not_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="shape"), naming_the_lost():
        raise RuntimeError("shape mismatch")
