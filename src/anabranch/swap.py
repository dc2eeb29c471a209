# SPDX-License-Identifier: Apache-2.0
"""A folder or a file takes the place of another all at once: a reader finds the old one or the new one, never half.

Order     : write into a hidden folder beside the target -> rename -> fsync the parent. Who fills it makes it durable.
Replacing : the complete new folder waits as `.NAME.new-TOKEN`; the old one is renamed to `.NAME.old-TOKEN`, the new
            one takes the name, the old one is deleted. After a crash between the renames `clean_leftovers` goes on.
Alive     : a writer holds a lock on its hidden folder for as long as it runs, so leftovers of the dead can be told
            apart without trusting process numbers. Where the file system has no such locks, leftovers stay.
Check     : dying before and after every file-system call loses nothing (tests/train/test_crash.py).
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from anabranch.errors import AnabranchError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<tag>gone|new|old)-(?P<token>[0-9a-f]{8})")
DISK_ERRORS = (OSError, SafetensorError)
"""safetensors reports a full disk as its own error, which is no OSError."""


def swap_in(fill: Callable[[Path], Any], target: Path, *, bytes_needed: int | None = None) -> Path:
    """Let `fill` fill an empty folder, then give it the name `target`, whatever had that before."""
    token = secrets.token_hex(4)
    new = target.parent / f".{target.name}.new-{token}"
    old = target.parent / f".{target.name}.old-{token}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target.parent)
        new.mkdir()
        with _alive(new):
            fill(new)
            if target.exists():
                os.rename(target, old)
            os.rename(new, target)
            sync(target.parent)
    except DISK_ERRORS as error:
        raise _not_written(target, error, bytes_needed) from error
    finally:
        # Missing while `old` exists: the second rename failed. Put it back before anything is deleted.
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.unfinished")


def swap_file(fill: Callable[[Path], Any], target: Path) -> None:
    """Let `fill` write a file, then give it the name `target`: whole or not at all, a power cut included."""
    fill(unfinished(target))
    sync(unfinished(target))
    unfinished(target).replace(target)
    sync(target.parent)


def swap_text(text: str, target: Path) -> None:
    swap_file(lambda file: file.write_text(text, encoding="utf-8", newline="\n"), target)


def remove_folder(target: Path) -> None:
    """Delete a folder so that a crash half-way leaves no torn folder under its name."""
    gone = target.parent / f".{target.name}.gone-{secrets.token_hex(4)}"
    os.rename(target, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean_leftovers(parent: Path) -> list[str]:
    """Finish or delete what dead writers left in `parent`; returns the names of the leftovers that were dealt with."""
    cleaned = []
    for entry in sorted(parent.iterdir(), key=lambda path: path.name):
        match = LEFTOVER.fullmatch(entry.name)
        if match is None or not entry.is_dir() or not _is_dead(entry):
            continue
        target = parent / match["name"]
        old = parent / f".{match['name']}.old-{match['token']}"
        new = parent / f".{match['name']}.new-{match['token']}"
        if match["tag"] == "old" and new.exists():
            continue  # its writer lives, or the roll-forward below has not happened yet
        if not target.exists() and (match["tag"] == "old" or (match["tag"] == "new" and old.exists())):
            os.rename(entry, target)  # the old folder moves away only once the new one is complete
            sync(parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(entry, ignore_errors=True)
        cleaned.append(entry.name)
    return cleaned


def sync(path: Path) -> None:
    """fsync a file or a folder; folders of file systems that cannot do it are left to their own devices."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Hold the lock that tells others that this folder's writer lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_dead(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _not_written(target: Path, error: Exception, bytes_needed: int | None) -> AnabranchError:
    free = None
    with suppress(OSError):
        free = f"{shutil.disk_usage(target.parent).free} bytes free"
    return AnabranchError(
        f"could not write {target}: {error}",
        expected=None if bytes_needed is None else f"{bytes_needed} bytes",
        received=free,
        hint="make room or choose another disk; nothing that was complete before was touched",
    )
