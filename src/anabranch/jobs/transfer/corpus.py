# SPDX-License-Identifier: Apache-2.0
"""Open the images of a job so that all of them fit one model."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anabranch.data.images import SHIPPED, Images, concat, open_images
from anabranch.errors import UsageError
from anabranch.jobs.resumed import same_as_before
from anabranch.measure import probes
from anabranch.models.bridge import bridge

TEST_SHARE = 0.5


def short_name(spec: str) -> str:
    """patchwork:garments -> garments, photos/birds/ -> birds."""
    return spec.rpartition(":")[2] if spec.partition(":")[0] in SHIPPED else Path(spec).resolve().name


def check_names(specs: Sequence[str], what: str, at_least: int) -> tuple[str, ...]:
    names = tuple(short_name(spec) for spec in specs)
    if len(names) < at_least:
        raise UsageError(
            f"too few {what}", expected=f"at least {at_least}", received=len(names), hint=f"--{what} DIR DIR"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two {what} are called {twice[0]!r}", expected="names that differ", hint="rename a folder")
    return names


def check_positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is too small", expected="at least 1", received=value)


def is_same(spec: str, other: str) -> bool:
    """Whether two specs name the same images; a folder inside another one is refused, as neither answer is right."""
    if ":" in spec or ":" in other:
        return spec == other
    one, two = Path(spec).expanduser().resolve(), Path(other).expanduser().resolve()
    if one != two and (one.is_relative_to(two) or two.is_relative_to(one)):
        raise UsageError(
            f"{spec} and {other} overlap",
            expected="a source and a task in folders of their own, or in the same one",
            hint="move one of them, or the test images would be learned from",
        )
    return one == two


def check_same_images(run: Path, sets: Sequence[Images]) -> None:
    """A resumed run has to see the images that it began with: same count, names and pixels (of a sample)."""
    same_as_before(
        run / "images.json", {f"images {i} ({images.name})": digest(images) for i, images in enumerate(sets, 1)}
    )


def digest(images: Images, sample: int = 500) -> str:
    rows = torch.linspace(0, len(images) - 1, min(sample, len(images))).long()
    state = hashlib.sha256(f"{len(images)} {images.files}".encode())
    state.update(images.store.read(rows).numpy().tobytes())
    return state.hexdigest()[:32]


def open_together(
    specs: Sequence[str],
    labelled: Sequence[bool],
    image_size: int | None,
    channels: int | None,
    preset: str | None,
    family: str = "vit_mae",
) -> list[Images]:
    """All folders at one size and with one number of channels: the largest found, unless they are given.

    Raises:
        UsageError: a folder cannot be read, or `preset` of the model family cannot take images of this size.
    """
    opened = [
        open_images(spec, image_size=image_size, channels=channels, labelled=with_labels)
        for spec, with_labels in zip(specs, labelled, strict=True)
    ]
    size = image_size or max(images.image_size for images in opened)
    depth = channels or max(images.channels for images in opened)
    if preset is not None:
        bridge(family).check_size(preset, size)
    return [
        replace(
            images
            if (images.image_size, images.channels) == (size, depth)
            else open_images(spec, image_size=size, channels=depth, labelled=with_labels),
            name=short_name(spec),
        )
        for spec, images, with_labels in zip(specs, opened, labelled, strict=True)
    ]


def with_split(task: Images, seed: int = 0) -> Images:
    """The task with a test half, drawn here where the folder brought none."""
    if task.is_test is not None:
        return task
    return replace(task, is_test=torch.from_numpy(probes.split(task.labels.numpy(), TEST_SHARE, seed)))


def at_most(images: Images, count: int, seed: int) -> Images:
    """A random subset, the same for the same seed."""
    if len(images) <= count:
        return images
    return images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values)


def mixture(pools: Sequence[Images]) -> Images:
    return replace(concat(pools), name="all")
