# SPDX-License-Identifier: Apache-2.0
"""What processes of a run do together is what one does alone."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from anabranch import cli
from anabranch.errors import AnabranchError
from anabranch.jobs.parallel import num_workers, side_by_side
from anabranch.jobs.together import first_alone, gathered, share, summed
from anabranch.jobs.transfer import embed
from anabranch.train.processes import TIMEOUT
from tests.many import load, read_all, run_many, run_rounds

WORKER = Path(__file__).with_name("together_worker.py")


def test_one_process_takes_all_and_waits_for_nobody():
    chunks = torch.arange(28, dtype=torch.float32).view(14, 2).split(3)
    assert share([3, 4]) == [3, 4]
    assert summed(2.0, 5.0) == [2.0, 5.0]
    assert first_alone(lambda: "done") == "done"
    assert torch.equal(gathered(chunks, lambda rows: rows * 2), torch.cat(chunks) * 2)


def test_pieces_of_shared_work_and_the_ways_in_which_it_ends(tmp_path):
    codes, said = run_rounds(2, WORKER, [["plain", tmp_path], ["lost", tmp_path], ["failed", tmp_path]], seconds=50)
    assert codes[0] == [0, 0], said
    assert codes[1] == [1, -9], said  # at once, though the work would take a minute and nothing is asked in between
    assert codes[2] == [1, 1], said
    assert "another process of this run was lost" in said
    assert "ZeroDivisionError" in said
    assert "the first process failed" in said
    first, second = read_all(tmp_path, "plain", 2)
    assert (first["share"], second["share"]) == ([0, 2, 4, 6], [1, 3, 5])
    assert first["summed"] == second["summed"] == [2.0, 1.0]
    assert (first["first"], second["first"]) == ("by 0", None)
    assert (tmp_path / "once" / "by").read_text() == "0"
    expected = torch.cat([c.cumsum(0) * 3 for c in torch.arange(28, dtype=torch.float32).view(14, 2).split(3)])
    assert second["gathered"] is None
    assert first["gathered"] == expected.tolist()


# transfer matrices


def measure_arguments(folders, out, *more):
    spread = ["--set", "batch_size=16", "--set", "num_labels=16", "--set", "image_size=32", "--set", "probe_points=1"]
    return [
        "measure", "--sources", str(folders / "pool/stripes"), str(folders / "pool/disc"), "--tasks",
        str(folders / "task"), "--out", str(out), "--steps", "6", "--seeds", "2", *spread, *more,
    ]  # fmt: skip


def numbers(run):
    result = json.loads((run / "transfer.json").read_text())
    return {name: value for name, value in result.items() if name != "seconds"}


def test_cells_are_made_once_and_told_to_all(tmp_path):
    rounds = [["stopped", tmp_path], ["cells", tmp_path]]  # the second goes on where the first was stopped
    codes, said = run_rounds(2, WORKER, rounds, seconds=50)
    assert codes == [[75, 75], [0, 0]], said
    assert said.count("stopped with 2 of 5 models finished") == 2
    first, second = read_all(tmp_path, "cells", 2)
    assert first == second
    assert list(first) == [f"cell-{i}" for i in range(5)]
    assert [first[f"cell-{i}"]["made"][-1] for i in range(5)] == ["0", "1", "0", "1", "0"]


@pytest.mark.slow
def test_a_transfer_matrix_of_two_processes_is_that_of_one(folders, tmp_path):
    """Every number, not nearly: a model is trained by one process, with one thread, as it is alone."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert cli.main(measure_arguments(folders, alone, "--set", "workers=1")) == 0
    codes, said = run_many(2, WORKER, "command", *measure_arguments(folders, both, "--set", "workers=1"))
    assert codes == [0, 0], said
    assert numbers(both) == numbers(alone)
    for cell in (alone / "models").iterdir():
        found, expected = (json.loads((run / "models" / cell.name).read_text()) for run in (both, alone))
        assert found["scores"] == expected["scores"]
    assert (both / "report.html").exists()


# clusters


def test_clusters_of_two_processes_are_those_of_one(folders, tmp_path, monkeypatch):
    """Bit for bit: images are looked at 32 at a time, by one process or the other."""
    monkeypatch.setattr(embed, "CHUNK", load(WORKER).CHUNK)
    base = tmp_path / "base"
    options = ["--steps", "2", "--set", "batch_size=16"]
    pool = ["--images", str(folders / "pool")]
    learn = ["--method", "mae", "--set", "image_size=32"]
    assert cli.main(["pretrain", *pool, *learn, "--out", str(base), *options]) == 0
    arguments = ["pretrain", *pool, "--base", str(base / "model"), "--clusters", "4", "--experts", "2", *options]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert cli.main([*arguments, "--out", str(alone)]) == 0
    codes, said = run_many(2, WORKER, "command", *arguments, "--out", str(both))
    assert codes == [0, 0], said
    for name in ("clusters.safetensors", "clusters.json"):
        assert (both / "clusters" / name).read_bytes() == (alone / "clusters" / name).read_bytes()


# workers that are killed


def killed(shared, item):
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_and_not_a_wait():
    with pytest.raises(AnabranchError, match="a process that did a part of the work was killed"):
        list(side_by_side(killed, None, [0, 1, 2, 3], workers=2))


def test_processes_of_a_launcher_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert num_workers(None, 100) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(None, 100) == 2
    assert num_workers(3, 100) == 3


def test_a_command_says_that_another_process_is_gone(monkeypatch, capsys):
    def gone(argv):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16288.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("anabranch.cli.measure.main", gone)
    assert cli.main(["measure"]) == 1
    assert f"within 600 s ({TIMEOUT})" in capsys.readouterr().err
