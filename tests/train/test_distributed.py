# SPDX-License-Identifier: Apache-2.0
"""Two processes under torchrun do what one does."""

import json
import sys

import pytest
import torch

from anabranch.train.checkpoint import checkpoint_steps, load_checkpoint
from anabranch.train.loop import TrainConfig, train

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]


@pytest.fixture(scope="module")
def two_processes(start_worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    process = start_worker("train_worker.py", "together", folder, launcher=LAUNCHER)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    config = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2, save_every=5, log_every=4)
    return folder, train(tiny.TinyObjective(dropout=0.0, batch_norm=False), tiny.TinyStream(), config, folder).losses


def test_nothing_is_connected_when_the_interpreter_ends(two_processes):
    """A thread of a connection that asks a dying interpreter for its lock aborts the process, now and then."""
    assert [rank["connected"] for rank in two_processes[1]] == [[], []]


def test_losses_and_parameters_are_those_of_one_process(two_processes, one_process):
    folder, ranks = two_processes
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one_process[1], abs=1e-5)
    alone, shared = (load_checkpoint(run).checkpoint for run in (one_process[0], folder / "run"))
    assert (alone.world_size, shared.world_size) == (1, 2)
    assert alone.model.keys() == shared.model.keys()
    assert alone.optimizer.keys() == shared.optimizer.keys()  # the unused weight has no state in either
    for name in alone.model.keys() - {"rows_seen"}:  # each process sees its own rows
        torch.testing.assert_close(alone.model[name], shared.model[name], atol=1e-5, rtol=0)


def test_only_the_first_process_reports(two_processes):
    assert [rank["lines_per_rank"] for rank in two_processes[1]] == [4, 0]


def test_a_signal_to_one_process_stops_both_after_the_same_step(two_processes, one_process):
    folder, ranks = two_processes
    for rank in ranks:
        exit_code, message = rank["stopped"]
        assert exit_code == 75
        assert "after step 6 of 12" in message
        assert rank["resumed_losses"] == pytest.approx(one_process[1][6:], abs=1e-5)
    assert checkpoint_steps(folder / "stopped") == [10, 12]


def test_a_bad_row_in_one_process_is_refused_by_both_before_the_update(two_processes):
    for rank in two_processes[1]:
        bad_row, not_shareable = rank["refused"]
        assert "step 4: the loss or its gradient is not finite" in bad_row[1]
        assert "the batch entry 'x'" in bad_row[1]
        assert bad_row[2]
        assert not_shareable[0]
        assert "expected: a multiple of the 2 processes\n  received: 7" in not_shareable[1]


@pytest.mark.row("R12")
def test_one_process_resumes_what_two_began(two_processes, tiny, tmp_path):
    """The number of processes is no part of the state."""
    folder, ranks = two_processes
    run = folder / "run"
    (run / "checkpoints" / "step-000012" / "manifest.json").unlink()
    config = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2, save_every=5, log_every=4)
    resumed = train(tiny.TinyObjective(dropout=0.0, batch_norm=False), tiny.TinyStream(), config, run, resume=True)
    assert resumed.losses == pytest.approx(ranks[0]["losses"][10:], abs=1e-5)
