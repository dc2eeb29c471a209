# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on finds, and has to see again. Of several processes the first writes and all read."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.jobs.together import first_alone
from anabranch.swap import swap_file
from anabranch.train.publish import read_json, write_json


def fingerprint_of(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def same_as_before(file: Path, seen: dict[str, str]) -> None:
    """A run that goes on has to see what it began with; the first call of a run writes it down.

    Raises:
        UsageError: one of `seen` is not what the file says.
    """
    first_alone(lambda: check_same(file, seen) if file.is_file() else note(file, seen))


def note(file: Path, seen: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, seen)


def check_same(file: Path, seen: dict[str, str]) -> None:
    before = read_json(file)
    if not isinstance(before, dict):
        raise UsageError(
            f"{file} is not what a run wrote", expected="names and fingerprints", received=type(before).__name__,
            hint="copy the run again, or another --out for a new one",
        )  # fmt: skip
    if changed := [name for name, value in seen.items() if before.get(name) != value]:
        raise UsageError(
            f"{', '.join(changed)}: not what this run began with",
            expected="what was there when it was started",
            received="; ".join(f"{name} {seen[name]} for {before.get(name)}" for name in changed),
            hint="put it back, or another --out for a new run",
        )


def kept(file: Path, key: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made once: the file holds it under its key; one that is torn or of another key is replaced."""
    first_alone(lambda: None if key in found(file) else keep(file, key, make()))
    return found(file)[key]


def found(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        return {}


def keep(file: Path, key: str, made: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    swap_file(lambda unfinished: save_file({key: made.contiguous()}, unfinished), file)
