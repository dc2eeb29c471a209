# SPDX-License-Identifier: Apache-2.0
"""Dies while saving, over and over, and counts what was lost. Run as `python crash_worker.py MODE FOLDER [COUNT]`."""

import errno
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from anabranch.errors import AnabranchError
from anabranch.swap import DISK_ERRORS, clean_leftovers
from anabranch.train import checkpoint as checkpoint_module
from anabranch.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from anabranch.train.publish import publish_folder, verify_folder
from anabranch.train.run_folder import RunFolder

DIED = 77
TRUNCATE = os.truncate


def snapshot(step, numbers=200):
    """Every tensor holds the step, so that a mixture of two checkpoints shows."""
    model = {"weight": torch.full((numbers,), float(step)), "count": torch.tensor(step)}
    return Checkpoint(step=step, model=model, optimizer={"exp_avg/weight": model["weight"] * 2}, config={}, extra={})


def is_whole(checkpoint):
    expected = snapshot(checkpoint.step, len(checkpoint.model["weight"]))
    return all(torch.equal(checkpoint.model[name], tensor) for name, tensor in expected.model.items()) and torch.equal(
        checkpoint.optimizer["exp_avg/weight"], expected.optimizer["exp_avg/weight"]
    )


class Death:
    """Counts file-system calls and ends the process at one of them: before, after, or with half a file written."""

    def __init__(self, fatal_call, moment):
        self.calls, self.fatal_call, self.moment = 0, fatal_call, moment

    def wrap(self, function, *, written_path=None):
        if self.moment == "torn" and written_path is None:
            return function

        def call(*arguments, **options):
            self.calls += 1
            fatal = self.calls == self.fatal_call
            if fatal and self.moment == "before":
                os._exit(DIED)
            try:
                return function(*arguments, **options)
            finally:
                if fatal and self.moment == "torn":
                    path = written_path(*arguments)
                    TRUNCATE(path, os.stat(path).st_size // 2)
                if fatal:
                    os._exit(DIED)

        return call

    def install(self):
        for name in ("open", "close", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate"):
            setattr(os, name, self.wrap(getattr(os, name)))
        io.open = self.wrap(io.open)
        Path.write_text = self.wrap(Path.write_text, written_path=lambda path, *rest: path)
        checkpoint_module.save_file = self.wrap(save_file, written_path=lambda tensors, path: path)


def fork_and_acknowledge(job):
    """Run `job(acknowledge)` in a child; returns its exit status and the numbers that it acknowledged."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        job(lambda number: os.write(writer, bytes([number])))
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    acknowledged = list(os.read(reader, 100))
    os.close(reader)
    return os.waitstatus_to_exitcode(status), acknowledged


def enumerate_crashes(folder, scenario, inspect, stride):
    """Die at the first call, the second ... until the scenario survives; `inspect` says what is wrong afterwards."""
    points, losses = 0, []
    for moment in ("before", "after", "torn"):
        for fatal_call in range(1, 10_000, stride):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

            def job(acknowledge, fatal_call=fatal_call, moment=moment):
                Death(fatal_call, moment).install()
                scenario(folder, acknowledge)

            exit_code, acknowledged = fork_and_acknowledge(job)
            if exit_code == 0:
                break
            assert exit_code == DIED, f"{moment} call {fatal_call}: exit code {exit_code}"
            points += 1
            problem = inspect(folder, max(acknowledged, default=0))
            if problem:
                losses.append(f"{moment} call {fatal_call}: {problem}")
    return {"points": points, "lost": losses}


def saving(folder, acknowledge):
    """Three saves, the third of which deletes the first, and one over a checkpoint that is there already."""
    for step in (1, 2, 3, 3):
        save_checkpoint(folder, snapshot(step))
        acknowledge(step)


def inspect_saving(folder, acknowledged):
    if (folder / "checkpoints").exists():
        clean_leftovers(folder / "checkpoints")  # what every start does: between two renames a name is free
    loaded = load_checkpoint(folder)
    step = loaded.checkpoint.step if loaded else 0
    if step < acknowledged or (loaded and not is_whole(loaded.checkpoint)):
        return f"acknowledged {acknowledged}, loaded {step}"
    save_checkpoint(folder, snapshot(step + 1))
    if load_checkpoint(folder).checkpoint.step != step + 1:
        return "the next save is not loaded"
    leftovers = [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
    return f"left behind {leftovers}" if leftovers else None


def publishing(folder, acknowledge):
    for number in (1, 2):
        publish_folder(lambda new, number=number: publish_content(new, number), folder / "result")
        acknowledge(number)


def publish_content(folder, number):
    (folder / "part").mkdir()
    (folder / "part" / "a.txt").write_text(f"{number}" * 1000)
    (folder / "b.txt").write_text(f"{number}" * 1000)


def inspect_publishing(folder, acknowledged):
    clean_leftovers(folder)
    number = 0
    if (folder / "result").exists():
        verify_folder(folder / "result")
        texts = {(folder / "result" / name).read_text() for name in ("part/a.txt", "b.txt")}
        number = next((n for n in (1, 2) if texts == {f"{n}" * 1000}), -1)
    if number < acknowledged:
        return f"acknowledged {acknowledged}, found {number}"
    publish_folder(lambda new: publish_content(new, 2), folder / "result")
    leftovers = [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]
    return f"left behind {leftovers}" if leftovers else None


def creating_run(folder, acknowledge):
    with RunFolder.open(folder / "run", {"seed": 1}):
        acknowledge(1)


def inspect_run(folder, acknowledged):
    """Whatever the moment, either the same command or the same command with --resume must work."""
    try:
        RunFolder.open(folder / "run", {"seed": 1}, resume=bool(acknowledged)).close()
    except AnabranchError as error:
        if acknowledged:
            return str(error)
        RunFolder.open(folder / "run", {"seed": 1}, resume=True).close()
    return None


def kill_at_random(folder, count, save, load):
    """SIGKILL a saving process at `count` random moments; lost is a restart that finds less than was acknowledged."""
    moments = random.Random(count)  # 20 and 200 are counted together: others each
    lost, saved, started = [], 3, time.perf_counter()
    for step in (1, 2, 3):
        save(folder, step)
    seconds_a_save = (time.perf_counter() - started) / 3
    for kill in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, saved.to_bytes(4, "big"))
            for step in range(saved + 1, saved + 10_000):
                save(folder, step)
                os.write(writer, step.to_bytes(4, "big"))
        os.close(writer)
        acknowledgements = b"".join(os.read(reader, 4) for _ in range(1 + kill % 2))  # it has begun; it has saved once
        time.sleep(moments.uniform(0, 2 * seconds_a_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([reader], [], [], 0)[0] and (part := os.read(reader, 65536)):
            acknowledgements += part
        os.close(reader)
        acknowledged = int.from_bytes(acknowledgements[-4:], "big")
        saved = load(folder)
        if saved < acknowledged:
            lost.append(f"kill {kill}: acknowledged {acknowledged}, loaded {saved}")
            saved = acknowledged
    return {"kills": count, "saves": saved, "lost": lost}


def save_well(folder, step):
    save_checkpoint(folder, snapshot(step, numbers=200_000))


def load_well(folder):
    loaded = load_checkpoint(folder)
    return loaded.checkpoint.step if loaded and is_whole(loaded.checkpoint) else 0


def save_in_place(folder, step, numbers=200_000):
    """What a plain loop does: the same files, one after the other over the last ones."""
    checkpoint = snapshot(step, numbers)
    checkpoint_module.save_file(checkpoint.model, folder / "model.safetensors")
    checkpoint_module.save_file(checkpoint.optimizer, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step}))


def load_in_place(folder):
    try:
        model, optimizer = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
        step = json.loads((folder / "state.json").read_text())["step"]
    except (*DISK_ERRORS, ValueError):
        return 0
    return step if is_whole(Checkpoint(step=step, model=model, optimizer=optimizer, config={})) else 0


def saving_in_place(folder, acknowledge):
    for step in (1, 2):
        save_in_place(folder, step, numbers=200)
        acknowledge(step)


def inspect_in_place(folder, acknowledged):
    return None if load_in_place(folder) >= acknowledged else f"acknowledged {acknowledged}"


def overwrite(folder, step):
    """In place to the byte; safetensors itself writes a file beside the old one and renames it."""
    checkpoint = snapshot(step, numbers=50_000)
    (folder / "model.safetensors").write_bytes(save(checkpoint.model))
    (folder / "optimizer.safetensors").write_bytes(save(checkpoint.optimizer))
    (folder / "state.json").write_text(json.dumps({"step": step}))


def fill_disk_in_place(folder, limits, apply):
    """The control: how often nothing can be loaded after a failing save over the last one."""
    lost = []
    for limit in limits:
        overwrite(folder, 1)
        undo = apply(limit)
        try:
            overwrite(folder, 2)
        except DISK_ERRORS:
            lost += [limit] if load_in_place(folder) == 0 else []
        finally:
            undo()
    return {"limits": len(limits), "lost": lost}


def fill_disk(folder, limits, apply):
    """Save under each limit: a failing save must say so, keep the last good checkpoint and leave nothing behind."""
    faults, wrong, messages = 0, [], set()
    for limit in limits:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        save_checkpoint(run, snapshot(1, numbers=50_000))
        undo = apply(limit)
        try:
            save_checkpoint(run, snapshot(2, numbers=50_000))
            expected = 2
        except AnabranchError as error:
            faults, expected = faults + 1, 1
            messages.add(str(error).replace(str(folder), "DISK"))
        finally:
            undo()
        names = sorted(entry.name for entry in (run / "checkpoints").iterdir())
        if load_checkpoint(run).checkpoint.step != expected or any(name.startswith(".") for name in names):
            wrong.append(f"limit {limit}: {names}")
    return {"faults": faults, "wrong": wrong, "messages": sorted(messages)}


def limit_file_size(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def leave_free(folder):
    """Fill the file system up to `limit` bytes."""

    def apply(limit):
        ballast = folder / "ballast"
        free = shutil.disk_usage(folder).free - limit
        with ballast.open("wb") as file:
            try:
                file.write(bytes(max(0, free)))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        return ballast.unlink

    return apply


def refuse_read_only(folder):
    """Without the rights of an administrator, who may write everywhere."""
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        RunFolder.open(closed / "run", {})
    except AnabranchError as error:
        return {"message": str(error), "exit_code": error.exit_code}
    return {"message": "written", "exit_code": 0}


def main(mode, folder, count="1"):
    folder = Path(folder)
    if mode == "some-of-each":  # in one process: starting it takes longer than most of what it does
        parts = {"enumerate": 7, "kill": 20, "file-size": 25, "read-only": 1}
        parts = {"enumerate-in-place": 1, "file-size-in-place": 25} | parts  # the last of all gives up its rights
        for part in parts:
            (folder / part).mkdir()
        return {part: main(part, folder / part, count) for part, count in parts.items()}
    if mode == "enumerate":
        return {
            "save": enumerate_crashes(folder / "save", saving, inspect_saving, int(count)),
            "publish": enumerate_crashes(folder / "publish", publishing, inspect_publishing, int(count)),
            "run": enumerate_crashes(folder / "run", creating_run, inspect_run, int(count)),
        }
    if mode == "enumerate-in-place":
        return enumerate_crashes(folder / "save", saving_in_place, inspect_in_place, 1)
    if mode == "kill":
        return kill_at_random(folder, int(count), save_well, load_well)
    if mode == "kill-in-place":
        return kill_at_random(folder, int(count), save_in_place, load_in_place)
    if mode == "file-size":
        return fill_disk(folder, range(0, 210_000, 210_000 // int(count)), limit_file_size)
    if mode == "file-size-in-place":
        return fill_disk_in_place(folder, range(0, 210_000, 210_000 // int(count)), limit_file_size)
    if mode == "full-disk":
        limits = range(0, 450_000, 450_000 // int(count))
        return fill_disk(folder, limits, leave_free(folder))
    return refuse_read_only(folder)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # counted, but not waited for: a killed process loses no page of the cache
    print(json.dumps(main(*sys.argv[1:])))
