# SPDX-License-Identifier: Apache-2.0
"""A tracker hears what metrics.jsonl says, no more and no less; without its package nothing starts."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from accelerate import tracking

from anabranch import cli
from anabranch.errors import AnabranchError, UsageError
from anabranch.train import trackers
from anabranch.train.config import TrainConfig
from anabranch.train.loop import train
from anabranch.train.metrics import MetricsWriter, read_metrics
from tests.train.tiny import TinyObjective, TinyStream

CONFIG = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "save_every": 4}


class Notebook(tracking.GeneralTracker):
    """A tracker of accelerate's kind that keeps what it hears."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, breaks_at=None):
        super().__init__()
        self.heard, self.closed, self.breaks_at = [], 0, breaks_at

    @property
    def tracker(self):
        return self.heard

    def log(self, values, step=None, **options):
        if step == self.breaks_at:
            raise ConnectionError("the line is down")
        self.heard.append({"step": step, **values})

    def finish(self):
        self.closed += 1


def test_it_hears_the_lines_and_no_number_that_is_none(tmp_path):
    notebook = Notebook()
    with MetricsWriter(tmp_path / "m.jsonl", tracker=notebook) as metrics:
        metrics.write(1, loss=0.1 + 0.2, accuracy=1.0)
        metrics.write(2, loss=math.nan, accuracy=0.5)
    told = [{k: v for k, v in line.items() if v is not None} for line in read_metrics(tmp_path / "m.jsonl")]
    assert notebook.heard == told
    assert notebook.heard[1] == {"step": 2, "accuracy": 0.5}
    assert notebook.closed == 1


def test_one_that_fails_is_let_go_and_the_record_goes_on(tmp_path):
    notebook = Notebook(breaks_at=2)
    with MetricsWriter(tmp_path / "m.jsonl", tracker=notebook) as metrics:
        metrics.write(1, loss=1.0)
        with pytest.warns(RuntimeWarning, match=r"notebook failed(.|\n)*the line is down"):
            metrics.write(2, loss=2.0)
        metrics.write(3, loss=3.0)
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in notebook.heard] == [1]


def test_a_run_tells_its_tracker_what_it_writes_and_what_it_writes_again(tmp_path, monkeypatch):
    heard, opened = [], []

    def open_notebook(name, run, *, after_step=0):
        opened.append((name, after_step))
        heard.append(Notebook())
        return heard[-1]

    monkeypatch.setattr("anabranch.train.loop.open_tracker", open_notebook)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("json",))
    train(TinyObjective(), TinyStream(), TrainConfig(**CONFIG, tracker="wandb"), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert heard[0].heard == lines
    assert len(lines) == 3
    (tmp_path / "checkpoints" / "step-000006" / "manifest.json").unlink()  # as if it had been lost: back to step 4
    train(TinyObjective(), TinyStream(), TrainConfig(**CONFIG), tmp_path, resume=True)
    assert opened[-1] == ("none", 4), "a run may go on without its tracker, or with another"
    assert [line["loss"] for line in heard[-1].heard] == [lines[-1]["loss"]]


def test_without_its_package_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    command = ["pretrain", "--images", "patchwork:digits", "--out", str(tmp_path / "run"), "--set", "tracker=wandb"]
    assert cli.main(command) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for command in ("align train", "erase train", "erase bake"):
        assert cli.main([*command.split(), "--out", str(tmp_path / "run"), "--set", "tracker=trackio"]) == 2
        assert "pip install trackio" in capsys.readouterr().err
    with pytest.raises(UsageError, match="pip install tensorboard"):
        TrainConfig(**CONFIG, tracker="tensorboard")


def test_misspelt_ones_and_runs_without_a_folder_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="did you mean tensorboard"):
        trackers.check_tracker("tensorbord")
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("json",))
    with pytest.raises(UsageError, match="would hear nothing"):
        train(TinyObjective(), TinyStream(), TrainConfig(**CONFIG, tracker="wandb"))


def test_one_that_can_not_start_says_so_before_a_step(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in its way")
    with pytest.raises(AnabranchError, match="tensorboard could not be started"):
        train(TinyObjective(), TinyStream(), TrainConfig(**CONFIG, tracker="tensorboard"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


# the real ones, where they are installed


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


SCRIPT = """
import sys
from pathlib import Path
from anabranch.train.config import TrainConfig
from anabranch.train.loop import train
from tests.train.tiny import TinyObjective, TinyStream
config = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, log_every=2, save_every=4, tracker=sys.argv[2])
train(TinyObjective(), TinyStream(), config, Path(sys.argv[1]), resume=len(sys.argv) > 3)
"""


def run(name, folder, *more, **environment):
    """In a process of its own, that has no way out: none of them may need one."""
    nowhere = "http://127.0.0.1:9"
    blocked = {"http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, "-c", SCRIPT, str(folder), name, *more]
    done = subprocess.run(
        command, env=os.environ | blocked | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return read_metrics(folder / "metrics.jsonl")


@installed("tensorboard")
def test_tensorboard_holds_the_numbers_of_a_run_that_was_resumed(tmp_path):
    lines = run("tensorboard", tmp_path)
    (tmp_path / "checkpoints" / "step-000006" / "manifest.json").unlink()
    lines = run("tensorboard", tmp_path, "resume")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(lines[0]) - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


@installed("wandb")
def test_wandb_writes_an_offline_run_beside_the_metrics(tmp_path):
    run("wandb", tmp_path, WANDB_MODE="offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


@installed("trackio")
def test_trackio_keeps_the_numbers_on_this_machine(tmp_path):
    lines = run("trackio", tmp_path / "mine", TRACKIO_DIR=str(tmp_path / "trackio"))
    import sqlite3

    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [line["step"] for line in lines]
    for (_, metrics), line in zip(rows, lines, strict=True):
        told = json.loads(metrics)
        assert {name: told[name] for name in set(line) - {"step"}} == {n: v for n, v in line.items() if n != "step"}
