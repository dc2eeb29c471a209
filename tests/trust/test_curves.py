# SPDX-License-Identifier: Apache-2.0
"""Small recipes: their losses are those written down in tests/golden, and a resume from any step changes no bit.

python -m tests.trust.test_curves        # writes the losses, after a change that is meant to change them
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from anabranch.errors import Stopped
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.signals import StopFlag
from tests.many import load
from tests.train.test_resume import lines_without_speed

TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden" / "losses.json"
NAMES = ("mae", "moce", "align", "erase")
CONFIG = {"steps": 50, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.05}
RESUMED = ("tiny", "moce", "sdr", "align", "erase")
"""Dropout and batch statistics; a learned gate; a moving average; experts of steps; a diffusion model."""


@pytest.fixture(scope="module")
def tasks(tiny):
    sys.modules["tiny"] = tiny
    yield load(TESTS / "train" / "sharded_tasks.py")
    del sys.modules["tiny"]


class Later:
    """The same stream, from another step on: other images, other masks."""

    def __init__(self, stream):
        self.stream = stream

    def batch(self, step):
        return self.stream.batch(step + 1000)


def losses_of(tasks, name, steps=50, shift=False):
    objective, stream = tasks.make(name)
    return train(objective, Later(stream) if shift else stream, TrainConfig(**CONFIG | {"steps": steps})).losses


def furthest(found, expected):
    """The largest relative difference of two losses of one step."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.row("N8")
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_that_were_written_down(tasks, name, counted):
    expected = json.loads(GOLDEN.read_text())[name]
    found = losses_of(tasks, name)
    assert len(expected) == 50
    pairs = enumerate(zip(found, expected, strict=True))
    wrong = [(step, a, b) for step, (a, b) in pairs if not abs(a - b) <= 1e-4 * abs(b)]  # NaN is wrong
    assert wrong == []
    counted(50, len(wrong))


@pytest.mark.row("N8")
def test_losses_of_other_draws_are_others(tasks, counted):
    """The control: five steps, from another place of the stream."""
    expected = json.loads(GOLDEN.read_text())
    other = [furthest(losses_of(tasks, name, 5, shift=True), expected[name][:5]) > 1e-4 for name in NAMES]
    counted(0, control=(sum(other), f"of {len(NAMES)} differ where other rows are drawn"), least=len(NAMES))


def digests(run):
    """Of everything in the newest checkpoint, and the lines of metrics so far."""
    manifest = json.loads((load_checkpoint(run).path / "manifest.json").read_text())
    return {file: facts["sha256"] for file, facts in manifest["files"].items()} | {"lines": lines_without_speed(run)}


def step_by_step(tasks, name, steps, run, monkeypatch):
    """A run that is stopped after each step and resumed by fresh objects: the checkpoint after each."""
    config, found = TrainConfig(**CONFIG | {"steps": steps, "save_every": 1, "log_every": 5}), []
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "is_set", property(lambda flag: True))
        for step in range(steps):
            objective, stream = tasks.make(name) if name != "tiny" else dropping(tasks)
            with pytest.raises(Stopped):
                train(objective, stream, config, run, resume=step > 0)
            found.append(digests(run))
    return found


def dropping(tasks):
    tiny = sys.modules["tiny"]
    return tiny.TinyObjective(), tiny.TinyStream()


def at_once(tasks, name, steps, run):
    """An uninterrupted run: what its checkpoint after each step holds."""
    config, found = TrainConfig(**CONFIG | {"steps": steps, "save_every": 1, "log_every": 5}), []
    objective, stream = tasks.make(name) if name != "tiny" else dropping(tasks)
    train(objective, stream, config, run, on_step=lambda step, logs: found.append(digests(run)) if step > 1 else None)
    return [*found, digests(run)]


@pytest.mark.slow
@pytest.mark.row("R4", cheap=True)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_from_each_of_64_steps_changes_no_bit(tasks, name, tmp_path, monkeypatch, counted):
    """Each step is done by a process' worth of new objects that know nothing but the checkpoint of the step before."""
    whole = at_once(tasks, name, 64, tmp_path / "whole")
    parts = step_by_step(tasks, name, 64, tmp_path / "parts", monkeypatch)
    assert len(whole) == len(parts) == 64
    assert len({json.dumps(one) for one in whole}) == 64  # every step changes something
    differ = [step for step, (a, b) in enumerate(zip(whole, parts, strict=True), 1) if a != b]
    assert len(whole[-1]["lines"]) == 13
    assert differ == []
    counted(63, len(differ))  # the first step is a start


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = load(TESTS / "train" / "sharded_tasks.py")
    GOLDEN.write_text(json.dumps({name: losses_of(made, name) for name in NAMES}, indent=1) + "\n")
