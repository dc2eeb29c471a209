# SPDX-License-Identifier: Apache-2.0
"""The captions of a folder of images, from wherever they were put.

Read from : `metadata.jsonl`, one JSON object a line with `file_name` (relative to the folder that the file lies in) and
            `text`, as the ImageFolder of the `datasets` library reads it, in the folder itself or one inside it;
            else from `NAME.txt` beside `NAME.png`.
Otherwise : made from the name of the class folder, by a template; "" where images lie in no class folder.
Refused   : captions for some images but not for others; anything odd in a file, rather than a caption guessed.
Check     : tests/data/test_captions.py
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from anabranch.data.folders import TEST_FOLDERS, refusal
from anabranch.errors import UsageError

TEMPLATE = "a photo of a {class}"
METADATA = "metadata.jsonl"
MAX_METADATA_BYTES, MAX_CAPTION_BYTES = 256 * 2**20, 64 * 2**10


def read_captions(folder: Path, files: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """One caption a file; `files` are relative to the folder, with forward slashes, as `list_folder` gives them."""
    root = Path(folder).resolve()
    listed = read_metadata(root, files)
    found = {file: listed[file] if file in listed else read_sidecar(root, file) for file in files}
    captions = {file: caption for file, caption in found.items() if caption is not None}
    missing = [file for file in files if file not in captions]
    if len(missing) == len(files) and not listed:
        return class_captions(files, template)
    if missing:
        raise UsageError(
            f"{folder}: {len(missing)} of {len(files)} images have no caption, the first is {missing[0]!r}",
            expected=f"a line in {METADATA} or a .txt file beside it, for every image or for none",
            hint="an empty text is a caption too",
        )
    return [captions[file] for file in files]


def class_captions(files: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """The template with each image's class folder, "" for images that lie in none."""
    check_template(template)
    names = class_folders(files)
    return ["" if name is None else template.replace("{class}", name) for name in names]


def class_folders(files: Sequence[str]) -> list[str | None]:
    """The first folder of each path, or the second where the first only says train or test."""
    parts = [PurePosixPath(file).parts for file in files]
    depth = 1 if {part[0] for part in parts} <= {"train", *TEST_FOLDERS} else 0
    return [part[depth] if len(part) > depth + 1 else None for part in parts]


def check_template(template: str) -> None:
    unknown = [place for place in re.findall(r"\{[^{}]*\}", template) if place != "{class}"]
    if unknown:
        raise UsageError("the caption cannot be filled in", expected="{class} only", received=unknown[0])


# metadata.jsonl


def read_metadata(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Captions by path relative to `root`, of every metadata.jsonl in a folder that holds images."""
    folders = sorted({parent.as_posix() for file in files for parent in PurePosixPath(file).parents})
    captions: dict[str, str] = {}
    for folder in folders:
        path = root / folder / METADATA
        if not path.exists() and not path.is_symlink():
            continue
        for where, name, text in metadata_rows(path, root):
            file = (PurePosixPath(folder) / name).as_posix()
            if file in captions:
                raise UsageError(f"{where}: {name!r} was named before", expected="every image once")
            captions[file] = text
    return captions


def metadata_rows(path: Path, root: Path) -> Iterator[tuple[str, str, str]]:
    """(place in the file, file name, caption) of each line; blank lines are skipped."""
    for number, line in enumerate(read_text(path, root, MAX_METADATA_BYTES).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{where}: no JSON object", expected='{"file_name": …, "text": …}', received=line[:80])
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not stays_inside(name):
            raise UsageError(f"{where}: unusable file_name", expected="a path inside the folder", received=repr(name))
        if not isinstance(text, str) or not is_text(text):
            raise UsageError(f"{where}: the caption is no text", expected='"text": "…"', received=repr(text)[:80])
        if len(text.encode()) > MAX_CAPTION_BYTES:
            raise UsageError(f"{where}: the caption is too long", expected=f"at most {MAX_CAPTION_BYTES} bytes")
        yield where, name, text


def stays_inside(name: str) -> bool:
    """Whether a relative path cannot lead out of its folder, here or on Windows."""
    parts = name.split("/")
    return not set(parts) & {"", ".", ".."} and not set(name) & {"\\", ":", "\0"}


def is_text(text: str) -> bool:
    """Whether it can be written down: JSON can hold halves of a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


# NAME.txt


def read_sidecar(root: Path, file: str) -> str | None:
    """The text beside an image without the white space around it, or None."""
    path = (root / file).with_suffix(".txt")
    if not path.exists() and not path.is_symlink():
        return None
    return read_text(path, root, MAX_CAPTION_BYTES).strip()


def read_text(path: Path, root: Path, limit: int) -> str:
    """UTF-8 text of at most `limit` bytes from a plain file in the folder."""
    if reason := refusal(path, root):
        raise UsageError(f"{path} cannot be read", expected="a file in the folder", received=reason)
    if path.stat().st_size > limit:
        raise UsageError(f"{path} is too large", expected=f"at most {limit} bytes", received=path.stat().st_size)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", received=str(error)) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", received=error.strerror) from error
