# SPDX-License-Identifier: Apache-2.0
"""The folder of one run: created once, resumed only on request and with the same configuration, written by one process.

    with RunFolder.open(path, config, resume=False) as run:
        train(objective, stream, train_config, run.path)

Under a launcher of several processes only the first (RANK 0) creates, checks and locks.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from anabranch.errors import UsageError
from anabranch.swap import sync

CONFIG = "config.resolved.yaml"
LOCK = ".lock"
UNWRITTEN_CONFIG = f".{CONFIG}.new"


class RunFolder:
    def __init__(self, path: Path, lock: ExitStack):
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, path: Path | str, config: Mapping[str, Any], resume: bool = False) -> "RunFolder":
        """Create the run `path`, or with `resume` open the one that is there. `config` holds plain YAML values."""
        path = Path(path)
        with ExitStack() as stack:
            if int(os.environ.get("RANK", "0")) == 0:
                with writing_to(path):
                    _refuse_strangers(path, resume)
                    path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(exclusive(path / LOCK, f"the run {path}"))
                    _settle_config(path, config, resume)
            return cls(path, stack.pop_all())

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the system's refusal (read-only, no permission, no such disk) into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write a run to {path}",
            expected="a folder that can be created and written",
            received=error.strerror,
            hint="another --out",
        ) from error


def place_for(out: Path) -> None:
    """The folder of a file to be written: made, or refused, before the work and not after it."""
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock file, which names its holder; the operating system frees it when the process ends in any way."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            hint = "wait until it ends, or use another --out"
            raise UsageError(f"{what} is in use by process {holder}", hint=hint) from error
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Dotted names of the entries that differ, in order."""
    keys: list[str] = []
    for key in sorted(before.keys() | now.keys(), key=str):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys += differing_keys(old, new, prefix=f"{prefix}{key}.")
        elif old != new or (key in before) != (key in now):
            keys.append(f"{prefix}{key}")
    return keys


def _refuse_strangers(path: Path, resume: bool) -> None:
    """A folder that is not a run is never written to; one that died before its configuration was written is new."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", expected="a folder for the run", hint="another --out")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    strangers = sorted(names - {LOCK, UNWRITTEN_CONFIG})
    if CONFIG in names:
        return
    if strangers:
        raise UsageError(
            f"{path} is not a run",
            expected=f"an empty folder, a new one, or one with {CONFIG}",
            received=", ".join(strangers[:3]),
            hint="another --out",
        )
    if resume:
        state = "it was stopped before it began" if names else "there is no run"
        raise UsageError(f"nothing to resume in {path}: {state}", hint="the same command without --resume")


def _settle_config(path: Path, config: Mapping[str, Any], resume: bool) -> None:
    config_now = yaml.safe_load(yaml.safe_dump(dict(config)))
    file = path / CONFIG
    if not file.exists():
        unwritten = path / UNWRITTEN_CONFIG
        unwritten.write_text(yaml.safe_dump(config_now, sort_keys=False), encoding="utf-8")
        sync(unwritten)
        os.rename(unwritten, file)
        sync(path)
        return
    if not resume:
        raise UsageError(f"{path} already holds a run", hint="--resume to go on with it, or another --out")
    try:
        config_before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid YAML", hint="another --out") from error
    if not isinstance(config_before, Mapping):
        received = type(config_before).__name__
        raise UsageError(f"{file} holds no settings", expected="a mapping", received=received, hint="another --out")
    keys = differing_keys(config_before, config_now)
    if keys:
        raise UsageError(
            f"{path} was started with another configuration",
            expected="; ".join(f"{key}: {_lookup(config_before, key)!r}" for key in keys[:3]),
            received="; ".join(f"{key}: {_lookup(config_now, key)!r}" for key in keys[:3]),
            hint="the earlier values, or another --out",
        )


def _lookup(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
