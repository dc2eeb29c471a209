# SPDX-License-Identifier: Apache-2.0
"""Whole pictures with their captions, one at a time: a folder keeps its sizes and names, shipped images become files.

Listed    : as `folders.list_folder` does; of a folder with train/ and test/, or shipped images with a test part, the
            training part only, as for every source.
Decoded   : as `decode` does, but neither cut nor resized: upright, 8 bit, grey where saved as grey, else RGB, on white.
Check     : tests/jobs/erase/test_icd.py
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from anabranch.data.captions import TEMPLATE, class_captions, read_captions
from anabranch.data.decode import GREY_MODES, UNREADABLE, open_picture, read_header, whole
from anabranch.data.folders import in_threads, list_folder, select_all
from anabranch.data.images import SHIPPED, BadImage, open_images
from anabranch.errors import UsageError


class Picture(NamedTuple):
    pixels: np.ndarray  # (H, W) or (H, W, 3) uint8
    saved_as: str
    """The file's own mode: L, RGB, CMYK, I;16 …"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    name: str
    files: tuple[str, ...]
    """Where each image came from, relative to `root`."""
    names: tuple[str, ...]
    """What each is called as a PNG file."""
    captions: tuple[str, ...]
    read: Callable[[str], Picture]
    """By one of `files`; raises one of `decode.UNREADABLE`."""
    root: Path | None = None
    refused: tuple[BadImage, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Sequence[int]) -> "Source":
        def of(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[row] for row in rows)

        return replace(self, files=of(self.files), names=of(self.names), captions=of(self.captions))


def open_source(spec: str, template: str = TEMPLATE) -> Source:
    """A folder, or `patchwork:NAME` and its like; nothing is decoded yet."""
    prefix, colon, _ = spec.partition(":")
    return shipped_source(spec, template) if colon and prefix in SHIPPED else folder_source(Path(spec), template)


def folder_source(folder: Path, template: str = TEMPLATE) -> Source:
    listing = list_folder(folder.expanduser())
    chosen = select_all(listing)
    return Source(
        name=chosen.name,
        files=chosen.files,
        names=png_names(chosen.files),
        captions=tuple(read_captions(listing.root, chosen.files, template)),
        read=lambda file: read_picture(listing.root / file),
        root=listing.root,
        refused=listing.refused,
        ignored=listing.ignored,
    )


def shipped_source(spec: str, template: str = TEMPLATE) -> Source:
    images = open_images(spec, labelled=True)
    images = images if images.is_test is None else images.take(~images.is_test)
    classes = [images.class_names[label] for label in images.labels.tolist()]
    rows = {f"{name}/{row:05}.png": row for row, name in enumerate(classes)}

    def read(file: str) -> Picture:
        pixels = images.store.read(torch.tensor([rows[file]]))[0].permute(1, 2, 0).numpy()
        return Picture(pixels[..., 0], "L") if images.channels == 1 else Picture(pixels, "RGB")

    files = tuple(rows)
    return Source(name=spec, files=files, names=files, captions=tuple(class_captions(files, template)), read=read)


def read_picture(path: Path) -> Picture:
    """The whole picture; raises one of `decode.UNREADABLE`."""
    with path.open("rb") as file, open_picture(file) as picture:
        return Picture(np.asarray(whole(picture, "L" if picture.mode in GREY_MODES else "RGB")), picture.mode)


def png_names(files: Sequence[str]) -> tuple[str, ...]:
    """a/b.jpg -> a/b.png; a/b.jpg.png where there is another a/b, told apart without regard to case."""
    stems = [PurePosixPath(file).with_suffix("").as_posix() for file in files]
    count = Counter(stem.casefold() for stem in stems)
    names = tuple(
        f"{stem if count[stem.casefold()] == 1 else file}.png" for stem, file in zip(stems, files, strict=True)
    )
    twice = [name for name, times in Counter(map(str.casefold, names)).items() if times > 1]
    if twice:
        same = [file for file, name in zip(files, names, strict=True) if name.casefold() == twice[0]]
        raise UsageError(
            f"{len(same)} images would have the same name", expected="names that differ", received=", ".join(same)
        )
    return names


def smallest(source: Source) -> tuple[str, int, int] | None:
    """(file, width, height) of the image with the shortest side, from the headers alone; None if none can be read."""

    def sides(file: str) -> tuple[str, int, int] | None:
        try:
            if source.root is not None:
                return file, *read_header(source.root / file)[:2]
            height, width = source.read(file).pixels.shape[:2]
        except UNREADABLE:  # decoding will find it again and say why
            return None
        return file, width, height

    files = source.files if source.root is not None else source.files[:1]  # shipped images are all of one size
    found = [known for known in in_threads(sides, files) if known is not None]
    return min(found, key=lambda known: min(known[1:]), default=None)
