# SPDX-License-Identifier: Apache-2.0
"""Files that are missing, empty or cut, places that cannot be written, a second writer: each is told in words."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anabranch.errors import AnabranchError, UsageError
from anabranch.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import publish_folder
from anabranch.train.run_folder import RunFolder
from tests.trust import stopping

OPTIONAL = "captions are optional: without any they are made from the folders"
NO_END = "a text of lines has no end mark"
WITHOUT = "a library that reads folders of others does without it"
ON_REQUEST = "left out on request: nobody can know that it was there"
BY_DESIGN = "metrics are cut by design: a torn last line is passed over, and there may be none yet"
SILENT = {
    "captions: missing metadata.jsonl": OPTIONAL,
    "captions: empty metadata.jsonl": OPTIONAL,
    "prompts.txt: cut prompts.txt": NO_END,
    "metrics.jsonl: cut metrics.jsonl": BY_DESIGN,
    "metrics.jsonl: empty metrics.jsonl": BY_DESIGN,
    "masks: missing 0.png": "an image without a mask is clean, as this format has it",
    "images: missing 0.png": "a folder of images is what is in it",
    "images: folder_instead 0.png": "a folder in a folder of images is one more place to look",
    "language: missing tokenizer_config.json": WITHOUT,
    "language: folder_instead tokenizer_config.json": WITHOUT,
    "eraser: missing geom_tokens.safetensors": ON_REQUEST,
    "eraser: folder_instead geom_tokens.safetensors": ON_REQUEST,
}
"""Damages that nobody can know of, and why. Everything else has to be told."""
NOWHERE = Path("/proc/nowhere")
"""Nobody can make a folder there, not even an administrator."""
HOLDER = """
import sys
from anabranch.train.run_folder import RunFolder
with RunFolder.open(sys.argv[1], {"seed": 1}, resume=sys.argv[2] == "resume"):
    print("held", flush=True)
    sys.stdin.read()
"""


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def folder_instead(file):
    file.unlink()
    file.mkdir()


def damaged(loader, root):
    """(how, file, a copy of the loader's folder with that damage)."""
    for damage in (missing, empty, cut, folder_instead):
        for number, file in enumerate(loader.files):
            folder = root / f"{loader.name}-{number}-{damage.__name__}"
            shutil.copytree(loader.folder, folder)
            if (folder / file).is_file():
                damage(folder / file)
                yield damage.__name__, file, folder


def plain_reader(folder):
    """Whether somebody who opens the newest checkpoint and asks nothing gets it."""
    newest = max((folder / "checkpoints").glob("step-*"))
    try:
        load_file(newest / "model.safetensors"), load_file(newest / "optimizer.safetensors")
        return json.loads((newest / "state.json").read_text())["step"] == 1
    except Exception:
        return False


@pytest.mark.row("R9")
def test_missing_empty_and_cut_files_are_told_in_words(loaders, tmp_path, counted):
    tried, silent, raw, seen = 0, [], {}, 0
    for loader in loaders.values():
        for how, file, folder in damaged(loader, tmp_path):
            tried += 1
            try:
                loader.open(folder)
                silent.append(f"{loader.name}: {how} {file}")
            except AnabranchError:
                pass
            except Exception as error:
                raw[f"{loader.name}: {how} {file}"] = f"{type(error).__name__}: {error}"[:200]
            seen += loader.name == "checkpoint" and "manifest" not in file and not plain_reader(folder)
    assert raw == {}
    assert sorted(silent) == sorted(SILENT)
    assert tried >= 40
    told = tried - len(SILENT)
    counted(told, control=(seen, "of 12 end a reader that trusts the newest checkpoint"), least=12)


# places


def writers(tiny, given):
    weights = {"weight": torch.zeros(2)}
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-2)
    stopping.profiling(given / "profiling")
    loops = {name: getattr(stopping, name)(given / name) for name in ("profiling", "chains", "sampling")}
    return {
        "run folder": lambda place: RunFolder.open(place / "run", {}),
        "training": lambda place: train(tiny.TinyObjective(), tiny.TinyStream(), config, place / "run"),
        "checkpoint": lambda place: save_checkpoint(
            place / "run", Checkpoint(step=1, model=weights, optimizer={}, config={})
        ),
        "published folder": lambda place: publish_folder(lambda folder: None, place / "result"),
        **{name: lambda place, loop=loop: loop.run(place, False) for name, loop in loops.items()},
    }


@pytest.mark.row("R9")
def test_places_that_cannot_be_written_are_told_in_words(tiny, tmp_path, counted):
    (tmp_path / "file").write_text("precious")
    raw, tried = {}, 0
    for name, write in writers(tiny, tmp_path).items():
        for place in (NOWHERE, tmp_path / "file"):
            tried += 1
            try:
                write(place)
                raw[f"{name} to {place}"] = "nothing was said"
            except AnabranchError:
                pass
            except Exception as error:
                raw[f"{name} to {place}"] = f"{type(error).__name__}: {error}"
    assert raw == {}
    assert (tmp_path / "file").read_text() == "precious"
    counted(tried, len(raw))


# two writers


def tries(write):
    """Whether it is let in."""
    try:
        write()
    except UsageError:
        return False
    return True


@pytest.mark.row("R9")
def test_a_second_writer_is_refused_and_a_killed_one_blocks_nobody(tmp_path, monkeypatch, counted):
    run, told, unlocked = tmp_path / "run", [], 0
    for number in range(3):
        command = [sys.executable, "-c", HOLDER, str(run), "resume" if number else "new"]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            try:
                RunFolder.open(run, {"seed": 1}, resume=resume).close()
                told.append("let in")
            except UsageError as error:
                told.append(f"in use by process {holder.pid}" in str(error) or str(error))
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda descriptor, how: None)
            unlocked += tries(lambda: RunFolder.open(run, {"seed": 1}, resume=True).close())
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
        RunFolder.open(run, {"seed": 1}, resume=True).close()  # the lock of a dead one is free
    assert told == [True] * 6
    counted(6, control=(unlocked, "of 3 second writers are let in where nobody asks the lock"), least=3)


@pytest.mark.row("R9")
def test_two_trainings_of_one_run_do_not_mix(tiny, tmp_path, monkeypatch, counted):
    """The second one begins in the midst of the first."""
    config = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, save_every=2)
    run, outcomes = tmp_path / "run", []

    def second(step, logs):
        if step == 3:
            try:
                train(tiny.TinyObjective(), tiny.TinyStream(), config, run, resume=True)
                outcomes.append("let in")
            except UsageError as error:
                outcomes.append("refused" if "in use by process" in str(error) else str(error))

    train(tiny.TinyObjective(), tiny.TinyStream(), config, run, on_step=second)
    assert outcomes == ["refused"]
    assert load_checkpoint(run).checkpoint.step == 6
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda descriptor, how: None)
        run = tmp_path / "unlocked"
        train(tiny.TinyObjective(), tiny.TinyStream(), config, run, on_step=second)
    counted(1, control=(outcomes.count("let in"), "of 1 training is let into another's run without the lock"))
