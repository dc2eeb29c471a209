# SPDX-License-Identifier: Apache-2.0
"""Publish a folder all at once (swap.py), with a manifest that tells what is as it was written from what is not.

Order     : write into a hidden folder beside the target -> fsync every file -> manifest.json (size and sha-256 of each
            file, written last) -> fsync every folder -> rename -> fsync the parent.
Check     : dying before and after every file-system call loses nothing (tests/train/test_crash.py).
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from anabranch.errors import AnabranchError, UsageError
from anabranch.swap import clean_leftovers, swap_in, swap_text, sync

MANIFEST = "manifest.json"
FORBIDDEN_CHARACTERS = frozenset('\\:*?"<>|')
RESERVED_STEMS = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
MAX_JSON_BYTES = 16 * 2**20


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

    def fill(new: Path) -> None:
        known = write(new)
        _seal(new, known if isinstance(known, Digests) else {})

    return swap_in(fill, target, bytes_needed=bytes_needed)


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
    """Whole or not at all, a power cut included."""
    swap_text(json.dumps(content, indent=1, allow_nan=False) + "\n", path)


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
