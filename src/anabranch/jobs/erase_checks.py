# SPDX-License-Identifier: Apache-2.0
"""What `anabranch erase` refuses before anything long: damaged adapters, data that changed since a run began."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.data.labels import Labels, read_labels, refuse_changed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter import (
    CONFIG,
    NEGATIVE,
    TOKENS,
    WHOLE,
    Adapter,
    Applied,
    apply,
    read_adapter,
    ready_negatives,
)
from anabranch.suppress.lora import WEIGHTS
from anabranch.train.publish import sync

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)
"""What readers raise on files that somebody cut off or wrote into; UsageError is none of them."""
TRAINED = ("lora", "denoiser", "tokens", "baked")


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


def open_adapter(pipe: Any, folder: Path, *, strength: float = 1.0) -> Applied:
    """`apply`, after a look at every file that it and its later use will need.

    Raises:
        UsageError: no adapter, one of another model, a damaged one, or a strength that would do nothing.
    """
    if not 0 < strength < float("inf"):
        raise UsageError(
            "this strength would do nothing, or the opposite",
            expected="a number above 0; 1 is what was trained",
            received=strength,
            hint="leave --adapter out to see the model as it is",
        )
    with damage_told(folder):
        check_whole(read_adapter(folder))
        return apply(pipe, folder, strength=strength)


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise damaged(folder, told(error)) from error


def damaged(folder: Path, received: str) -> UsageError:
    return UsageError(
        f"the adapter {folder} is damaged",
        expected="its files as anabranch erase train or bake wrote them",
        received=received,
        hint="copy the folder again, or train again into another --out",
    )


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def check_whole(adapter: Adapter) -> None:
    config, folder = adapter.config, adapter.folder
    if missing := [name for name in ("trained", "family", "base", "concept") if not isinstance(config.get(name), str)]:
        raise damaged(folder, f"{CONFIG} without {', '.join(missing)}")
    if adapter.trained not in TRAINED:
        raise damaged(folder, f"{CONFIG}: trained is {adapter.trained!r}, none of {', '.join(TRAINED)}")
    needed = [WEIGHTS] if adapter.has_lora else [f"{WHOLE}/config.json"] if adapter.trained == "denoiser" else []
    needed += [] if adapter.trained == "baked" else [NEGATIVE]
    if gone := [name for name in needed if not (folder / name).is_file()]:
        raise damaged(folder, f"no {', '.join(gone)}")
    if adapter.trained != "baked" and "name" not in ready_negatives(folder):
        raise damaged(folder, f"{NEGATIVE} without the negative prompt 'name'")
    check_places(adapter)
    if adapter.rows is not None:
        check_words(adapter)


def check_places(adapter: Adapter) -> None:
    known = set(adapter.vocabulary.grid.bins())
    strange = [place for bins in adapter.training_bins for place in bins if place not in known]
    counts = adapter.counts
    if strange or len(counts) != len(adapter.training_bins) or not all(type(n) is int and n > 0 for n in counts):
        grid = f"{adapter.vocabulary.grid.columns} x {adapter.vocabulary.grid.rows}"
        told = f"the bin {list(strange[0])}" if strange else f"{len(counts)} counts, some of them no counts"
        raise damaged(adapter.folder, f"{CONFIG}: {told} beside a grid of {grid}")


def check_words(adapter: Adapter) -> None:
    with safe_open(adapter.folder / TOKENS, framework="pt") as file:
        found = set(file.keys())
    expected = {f"{name}/{word}" for name in adapter.rows or {} for word in adapter.vocabulary.words()}
    if surplus := sorted(found - expected):
        raise damaged(adapter.folder, f"{TOKENS} holds {surplus[0]!r}, which is in no grid of {CONFIG}")


# what a resumed run finds, and has to see again


def fingerprint_of(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def same_as_before(file: Path, seen: dict[str, str]) -> None:
    """A run that goes on has to see what it began with; the first call of a run writes it down.

    Raises:
        UsageError: one of `seen` is not what the file says.
    """
    if file.is_file():
        with damage_told(file.parent):
            before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name, value in seen.items() if before.get(name) != value]:
            raise UsageError(
                f"{', '.join(changed)}: not what this run began with",
                expected="what was there when it was started",
                received="; ".join(f"{name} {seen[name]} for {before.get(name)}" for name in changed),
                hint="put it back, or another --out for a new run",
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unwritten = file.with_suffix(".unfinished")
    unwritten.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    sync(unwritten)
    unwritten.replace(file)


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
