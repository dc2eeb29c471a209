# SPDX-License-Identifier: Apache-2.0
"""Images as every command sees them: 8-bit squares of one size, read by index, with labels where there are any.

Spec      : a folder · `patchwork:<domain>` (shipped with the package) · `corpus:<name>` (larger, from another package)
            · `planted:<domain>-<code>` (a shipped domain in another pixel code).
Labelled  : a task. A folder holds one folder a class, or `train/` and `test/` (or `val/`) that do; all of it is kept
            and `is_test` says which part is which (None where no split is given).
Unlabelled: a source. A folder may be laid out in any way; where it has `train/` beside `test/` or `val/`, or the
            shipped images have a test part, only the training part is read: what is tested on is never trained on.
Memory    : up to 2 GiB of pixels are held in memory, more in a memory-mapped file.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.errors import AnabranchError, UsageError, did_you_mean

MEMORY_LIMIT = 2 * 2**30
SHIPPED = ("patchwork", "corpus", "planted")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BadImage:
    """A file that was found but could not be used."""

    path: str
    reason: str
    sha256: str = ""


class UnreadableImages(UsageError):
    """Too many unreadable images; `bad` lists all of them."""

    def __init__(self, what: str, bad: tuple[BadImage, ...], **facts: object):
        super().__init__(what, **facts)
        self.bad = bad


@dataclass(frozen=True, eq=False)
class Store:
    """Rows of one or more uint8 tensors (M, C, S, S), in memory or mapped to files; a subset copies no pixels."""

    parts: tuple[Tensor, ...]
    rows: Tensor  # (N,) int64 into the parts laid end to end

    @classmethod
    def of(cls, pixels: Tensor) -> "Store":
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError(f"pixels: expected uint8 (N, C, H, W), received {pixels.dtype} {tuple(pixels.shape)}")
        return cls((pixels,), torch.arange(len(pixels)))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Tensor) -> Tensor:
        """(B, C, H, W) uint8, in the order of `indices`."""
        rows_B = self.rows[indices]
        if len(self.parts) == 1:
            return self.parts[0][rows_B]
        out_BCHW = torch.empty(len(rows_B), *self.parts[0].shape[1:], dtype=torch.uint8)
        start = 0
        for part in self.parts:
            here_B = (rows_B >= start) & (rows_B < start + len(part))
            out_BCHW[here_B] = part[rows_B[here_B] - start]
            start += len(part)
        return out_BCHW


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    name: str
    store: Store
    labels: Tensor | None = None  # (N,) int64
    class_names: tuple[str, ...] = ()
    is_test: Tensor | None = None  # (N,) bool
    quarantine: tuple[BadImage, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    """How many files of each kind lay in the folder and were not read as images."""
    files: tuple[str, ...] | None = None
    """Where each image came from, relative to the folder."""

    def __post_init__(self):
        for what in ("labels", "is_test", "files"):
            rows = getattr(self, what)
            if rows is not None and len(rows) != len(self.store):
                raise ValueError(f"{what}: expected {len(self.store)} entries, received {len(rows)}")

    def __len__(self) -> int:
        return len(self.store)

    @property
    def channels(self) -> int:
        return self.store.parts[0].shape[1]

    @property
    def image_size(self) -> int:
        return self.store.parts[0].shape[-1]

    def take(self, indices: Tensor) -> "Images":
        """The images at `indices` (or where a mask is true); pixels are shared, not copied."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        return replace(
            self,
            store=Store(self.store.parts, self.store.rows[indices]),
            labels=None if self.labels is None else self.labels[indices],
            is_test=None if self.is_test is None else self.is_test[indices],
            files=None if self.files is None else tuple(self.files[i] for i in indices.tolist()),
        )

    def unlabelled(self) -> "Images":
        """The training part without its labels."""
        training = self if self.is_test is None else self.take(~self.is_test)
        return replace(training, labels=None, class_names=(), is_test=None)


def concat(sources: Sequence[Images]) -> Images:
    """One mixture, in order. Labels survive where all sources have the same classes, splits where all have one."""
    shapes = {(images.channels, images.image_size) for images in sources}
    if len(shapes) != 1:
        received = ", ".join(f"{i.name} {i.channels} x {i.image_size} x {i.image_size}" for i in sources)
        raise UsageError(
            "images to be mixed differ in size or channels",
            expected="one shape (channels x height x width)",
            received=received or "no images",
            hint="give image_size and channels when opening them",
        )
    offsets = np.cumsum([0, *(sum(map(len, images.store.parts)) for images in sources)])
    rows = [images.store.rows + int(offset) for images, offset in zip(sources, offsets, strict=False)]
    same_classes = len({images.class_names for images in sources}) == 1
    return Images(
        name="+".join(images.name for images in sources),
        store=Store(tuple(part for images in sources for part in images.store.parts), torch.cat(rows)),
        labels=_joined([images.labels for images in sources]) if same_classes else None,
        class_names=sources[0].class_names if same_classes else (),
        is_test=_joined([images.is_test for images in sources]),
        quarantine=tuple(bad for images in sources for bad in images.quarantine),
    )


def _joined(columns: list[Tensor | None]) -> Tensor | None:
    return None if any(column is None for column in columns) else torch.cat(columns)


def open_images(
    spec: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    labelled: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Images:
    """Read all images that `spec` names (see the top of this file).

    `image_size` None keeps the size where all images are equal squares of at most 64 pixels, else 224. `channels` None
    gives 1 where every image is grey, else 3. `cache` is a folder for decoded pixels, reused by the next run and shared
    by the processes of one; without it, more than 2 GiB go to a file that disappears with the process. `progress` is
    called with (done, total) images.
    """
    if channels not in (1, 3, None):
        raise UsageError("channels", expected="1 (grey) or 3 (colour)", received=channels)
    if image_size is not None and not 1 <= image_size <= 4096:
        raise UsageError("image_size", expected="1 to 4096 pixels", received=image_size)
    prefix, colon, name = str(spec).partition(":")
    if isinstance(spec, str) and colon and prefix in SHIPPED:
        images = load_shipped(prefix, name)
        return fit(images if labelled else images.unlabelled(), image_size, channels)

    from anabranch.data.folders import open_folder

    folder = Path(spec).expanduser()
    if colon and "/" not in prefix and not folder.exists():
        hint = did_you_mean(prefix, SHIPPED)
        raise UsageError(f"{spec}: there are no images of the kind {prefix!r}, and no such folder", hint=hint)
    return open_folder(folder, image_size, channels, labelled=labelled, cache=cache, progress=progress)


def load_shipped(prefix: str, name: str) -> Images:
    if prefix == "patchwork":
        from anabranch.data.patchwork import load
    elif prefix == "planted":
        from anabranch.data.planted import load
    else:
        from anabranch.data.adapters import load
    return load(name)


def fit(images: Images, image_size: int | None, channels: int | None) -> Images:
    """Square images at another size (bicubic, antialiased); grey ones repeated over three channels where asked."""
    if image_size not in (None, images.image_size):
        pixels = allocate((len(images), images.channels, image_size, image_size))
        for rows in torch.arange(len(images)).split(512):
            pixels[rows] = resized(images.store.read(rows), image_size)
        images = replace(images, store=Store.of(pixels))
    if channels not in (None, images.channels):
        if channels == 1:
            raise UsageError(f"{images.name}: colour images cannot be turned grey here", expected=3, received=1)
        parts = tuple(part.expand(-1, 3, -1, -1) for part in images.store.parts)
        images = replace(images, store=Store(parts, images.store.rows))
    return images


def resized(pixels: Tensor, image_size: int) -> Tensor:
    """uint8 in, uint8 out."""
    out = F.interpolate(pixels.float(), size=(image_size, image_size), mode="bicubic", antialias=True)
    return out.round().clamp(0, 255).to(torch.uint8)


def allocate(shape: tuple[int, int, int, int], path: Path | None = None) -> Tensor:
    """Room for uint8 pixels: in memory, mapped to `path`, or above 2 GiB to an unnamed file that vanishes by itself."""
    num_bytes = int(np.prod(shape))
    if path is None and num_bytes <= MEMORY_LIMIT:
        return torch.zeros(shape, dtype=torch.uint8)
    folder = Path(tempfile.gettempdir()) if path is None else path.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise AnabranchError(
            "not enough disk space for the decoded images",
            expected=f"{num_bytes / 2**30:.1f} GiB free in {folder}",
            received=f"{free / 2**30:.1f} GiB",
            hint="give a cache folder on a larger disk (or set TMPDIR), or a smaller image_size",
        )
    with tempfile.TemporaryFile(dir=folder) if path is None else path.open("wb+") as file:
        if hasattr(os, "posix_fallocate"):  # writing to a mapped hole on a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))


def write_quarantine(path: Path, bad: Iterable[BadImage]) -> None:
    """One JSON object a line: path, reason, sha256."""
    lines = [json.dumps({"path": b.path, "reason": b.reason, "sha256": b.sha256}) + "\n" for b in bad]
    Path(path).write_text("".join(lines), encoding="utf-8")
