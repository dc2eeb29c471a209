# SPDX-License-Identifier: Apache-2.0
"""What `anabranch erase` refuses before anything long: torn models and labels, data that changed since a run began."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.data.labels import Labels, read_labels, refuse_changed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter_folder import UNREADABLE, damage_told, told
from anabranch.swap import sync
from anabranch.train.processes import processes


def open_model(folder: Path) -> Any:
    """`open_pipeline`; a folder that is torn is an error that says so."""
    try:
        return open_pipeline(folder)
    except UNREADABLE as error:
        raise UsageError(
            f"the model {folder} cannot be opened",
            expected="a whole folder, as pipe.save_pretrained wrote it",
            received=told(error),
            hint="copy it again; nothing is downloaded here",
        ) from error


def open_labels(path: Path, images: Path | None) -> Labels:
    """`read_labels`, and every image is the very one that was scanned."""
    try:
        labels = read_labels(path, images)
    except UNREADABLE as error:
        raise UsageError(
            f"{path} cannot be read", expected="the labels.jsonl of anabranch erase scan", received=told(error),
            hint="scan the images again",
        ) from error  # fmt: skip
    refuse_changed(labels)
    return labels


# what a resumed run finds, and has to see again


def fingerprint_of(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def same_as_before(file: Path, seen: dict[str, str]) -> None:
    """A run that goes on has to see what it began with; the first call of a run writes it down.

    Raises:
        UsageError: one of `seen` is not what the file says.
    """
    with processes().main_process_first():  # which may not have made the run's folder yet
        if file.is_file():
            check_same(file, seen)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        unwritten = file.with_suffix(".unfinished")
        unwritten.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
        sync(unwritten)
        unwritten.replace(file)


def check_same(file: Path, seen: dict[str, str]) -> None:
    with damage_told(file.parent):
        before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [name for name, value in seen.items() if before.get(name) != value]:
        raise UsageError(
            f"{', '.join(changed)}: not what this run began with",
            expected="what was there when it was started",
            received="; ".join(f"{name} {seen[name]} for {before.get(name)}" for name in changed),
            hint="put it back, or another --out for a new run",
        )


def kept(file: Path, key: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made once: the file holds it under its key; one that is torn or of another key is replaced."""
    if file.is_file():
        try:
            found = load_file(file)
        except SafetensorError:
            found = {}
        if key in found:
            return found[key]
    made = make().contiguous()  # as it is read back: strides of their own would change the last bit of what follows
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    save_file({key: made}, unfinished)
    sync(unfinished)
    unfinished.replace(file)
    return made
