# SPDX-License-Identifier: Apache-2.0
"""Publish a folder all at once: a reader finds the old one or the new one, never half of either.

Order     : write into a hidden folder beside the target -> fsync every file -> manifest.json (size and sha-256 of each
            file, written last) -> fsync every folder -> rename -> fsync the parent.
Replacing : the complete new folder waits as `.NAME.new-TOKEN`; the old one is renamed to `.NAME.old-TOKEN`, the new
            one takes the name, the old one is deleted. After a crash between the renames `clean_leftovers` goes on.
Alive     : a writer holds a lock on its hidden folder for as long as it runs, so leftovers of the dead can be told
            apart without trusting process numbers. Where the file system has no such locks, leftovers stay.
Check     : dying before and after every file-system call loses nothing (tests/train/test_crash.py).
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from anabranch.errors import AnabranchError, UsageError

MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<tag>gone|new|old)-(?P<token>[0-9a-f]{8})")
FORBIDDEN_CHARACTERS = frozenset('\\:*?"<>|')
RESERVED_STEMS = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
MAX_JSON_BYTES = 16 * 2**20
DISK_ERRORS = (OSError, SafetensorError)
"""safetensors reports a full disk as its own error, which is no OSError."""


class Digest(NamedTuple):
    """Size and sha-256 of a file that another process wrote and looked at."""

    bytes: int
    sha256: str


class Digests(dict[str, Digest]):
    """By the relative path of the file."""


def publish_folder(write: Callable[[Path], None], target: Path, *, bytes_needed: int | None = None) -> Path:
    """Let `write` fill an empty folder, then give it the name `target` in one step.

    An existing target is replaced only if every file in it was published by this function: a folder that holds
    anything else is refused before `write` is called.
    """
    target = Path(os.path.abspath(target))
    if target.parent.is_dir():
        clean_leftovers(target.parent)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"cannot publish {target}", expected="a folder or a free name", received="something else")
    strangers = _files(target).keys() - _manifest_names(target) if target.exists() else set()
    if strangers:
        raise UsageError(
            f"{target} holds files that would be lost",
            expected="a free name, an empty folder, or an earlier result of the same command",
            received=", ".join(sorted(strangers)[:3]),
            hint="name another folder",
        )
    return replace_folder(write, target, bytes_needed=bytes_needed)


def refuse_other_results(out: Path, result: str) -> None:
    """`publish_folder` replaces what any command published; this asks for the file that every result of one has."""
    if out.is_dir() and any(out.iterdir()) and not (out / result).is_file():
        raise UsageError(
            f"{out} is there already",
            expected="a free name, an empty folder, or an earlier result of the same command",
            received=", ".join(sorted(path.name for path in out.iterdir())[:3]),
            hint="name another folder with --out",
        )


def replace_folder(write: Callable[[Path], Any], target: Path, *, bytes_needed: int | None = None) -> Path:
    """`publish_folder` without asking what the target holds; for folders that only we write.

    `write` may return a `Digests`, so that large files are not read by one process alone.
    """
    token = secrets.token_hex(4)
    new = target.parent / f".{target.name}.new-{token}"
    old = target.parent / f".{target.name}.old-{token}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target.parent)
        new.mkdir()
        with _alive(new):
            known = write(new)
            _seal(new, known if isinstance(known, Digests) else {})
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


def install(staged: Path, out: Path, *, last: str) -> None:
    """Move files from `staged` to `out`, a run's folder; the file that makes it a result comes last."""
    (out / last).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        else:
            sync(path)
        os.replace(path, out / path.name)
    staged.rmdir()
    sync(out)


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


def verify_folder(folder: Path) -> dict[str, int]:
    """Sizes of the files in the manifest, after comparing each with its sha-256; raises on the first difference."""
    entries = _read_manifest(folder)
    for name, entry in entries.items():
        path = folder / name
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            raise AnabranchError(f"{path.name}: {error.strerror}") from error
        if not stat.S_ISREG(mode):  # a pipe would block the reader for ever, a link may point anywhere
            raise AnabranchError(f"{name}: not a regular file")
        if path.stat().st_size != entry["bytes"]:
            raise AnabranchError(f"{name}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise AnabranchError(f"{name}: its content changed after it was written (sha-256 differs)")
    return {name: entry["bytes"] for name, entry in entries.items()}


def is_safe_name(name: str) -> bool:
    """Whether a relative path read from a file stays inside its folder on every operating system."""
    if not name.isprintable() or len(name) > 1024 or FORBIDDEN_CHARACTERS & set(name):
        return False
    return all(
        0 < len(part.encode()) <= 255
        and not part.endswith((".", " "))
        and part.split(".")[0].strip().upper() not in RESERVED_STEMS
        for part in name.split("/")
    )


def read_json(path: Path) -> Any:
    """A JSON document of at most 16 MiB; every way in which it can be wrong is an AnabranchError."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise AnabranchError(f"{path.name}: not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AnabranchError(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AnabranchError(f"{path.name}: missing") from error
    except OSError as error:
        raise AnabranchError(f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AnabranchError(f"{path.name}: not valid JSON") from error


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


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


def _seal(folder: Path, known: Mapping[str, Digest]) -> None:
    """Make every file durable, then describe them all in the manifest."""
    entries = {}
    for name, path in _files(folder).items():
        if not is_safe_name(name):
            raise AnabranchError(f"cannot publish a file named {name!r}", expected="a portable name")
        sync(path)
        entries[name] = (known.get(name) or digest_of(path))._asdict()
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=1))
    sync(manifest)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def _files(folder: Path) -> dict[str, Path]:
    """Everything in the folder that is no folder, by its relative path; the manifest itself left out."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in paths.items() if name != MANIFEST and (path.is_symlink() or not path.is_dir())}


def _manifest_names(folder: Path) -> set[str]:
    with suppress(AnabranchError):
        return set(_read_manifest(folder))
    return set()


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    document = read_json(folder / MANIFEST)
    entries = document.get("files") if isinstance(document, dict) and document.get("format") == 1 else None
    if not isinstance(entries, dict):
        raise AnabranchError(f"{MANIFEST}: not a manifest that this version can read")
    for name, entry in entries.items():
        if not is_safe_name(name):
            raise AnabranchError(f"{MANIFEST}: unsafe file name {name!r}")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise AnabranchError(f"{MANIFEST}: the entry of {name} is not a size and a sha-256")
    return entries


def digest_of(path: Path) -> Digest:
    return Digest(path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
