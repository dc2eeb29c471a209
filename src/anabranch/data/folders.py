# SPDX-License-Identifier: Apache-2.0
"""Read a folder of pictures: list it, refuse what is unsafe, decode everything once, account for every file.

Listing   : PNG, JPEG and WebP by extension, at any depth; other and hidden files are counted, never opened.
Refused   : links that lead out of the folder, links to folders, pipes and devices; each is listed with its reason.
Verified  : all pixels are decoded here, so that a broken file is found now and not after hours; up to 1 % may be bad.
Cache     : decoded pixels, named after the paths, sizes and times of the files; the small `.json` is written last, so
            that a cache without it is unfinished and ignored.
"""

import hashlib
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anabranch.data.decode import SUFFIXES, UNREADABLE, decode, explain, read_header, sha256_of
from anabranch.data.images import SHIPPED, BadImage, Images, Progress, Store, UnreadableImages, allocate
from anabranch.errors import UsageError, did_you_mean

MAX_BAD_SHARE = 0.01
NATIVE_SIZE_LIMIT, DEFAULT_SIZE = 64, 224
TEST_FOLDERS = ("test", "val", "valid", "validation")
CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Listing:
    root: Path
    files: tuple[str, ...]  # relative, with forward slashes, sorted
    folders: tuple[str, ...]
    refused: tuple[BadImage, ...]
    ignored: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The listed files that will be read, and what the layout says of each."""

    name: str
    files: tuple[str, ...]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    is_test: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Decoded:
    pixels: Tensor  # (N, C, S, S) uint8; rows of bad images are zero
    bad: dict[int, BadImage]
    all_grey: bool


def open_folder(
    folder: Path,
    image_size: int | None = None,
    channels: int | None = None,
    *,
    labelled: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Images:
    """All images of a folder as `open_images` describes them."""
    listing = list_folder(folder)
    chosen = select_labelled(listing) if labelled else select_all(listing)
    size, depth = shape_of(listing.root, chosen.files, image_size, channels)
    decoded = decode_all(listing.root, chosen.files, size, depth, cache, progress)
    bad = listing.refused + tuple(decoded.bad[i] for i in sorted(decoded.bad))
    refuse_too_many(folder, bad, len(chosen.files) + len(listing.refused))

    pixels = decoded.pixels[:, :1] if channels is None and decoded.all_grey else decoded.pixels
    good = torch.tensor([i for i in range(len(chosen.files)) if i not in decoded.bad])
    images = Images(store=Store.of(pixels), quarantine=bad, ignored=listing.ignored, **vars(chosen)).take(good)
    if labelled:
        refuse_small_classes(folder, images.labels, images.is_test, images.class_names)
    return images


# 1. list


def list_folder(folder: Path) -> Listing:
    """Every file below `folder`, each in exactly one of: files, refused, ignored."""
    refuse_missing(folder)
    root = folder.resolve()
    files, folders, refused, ignored = [], [], [], Counter()
    for where, folder_names, file_names in os.walk(root, onerror=_refuse_closed):
        ignored["hidden"] += sum(name.startswith(".") for name in folder_names)
        folder_names[:] = sorted(name for name in folder_names if not name.startswith("."))
        for name in folder_names:
            path = Path(where, name)
            folders.append(path.relative_to(root).as_posix())
            if path.is_symlink():
                refused.append(BadImage(folders[-1], "a link to a folder; only folders themselves are read"))
        for name in file_names:
            path = Path(where, name)
            if name.startswith("."):
                ignored["hidden"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                ignored[path.suffix.lower() or "no extension"] += 1
            elif reason := refusal(path, root):
                refused.append(BadImage(path.relative_to(root).as_posix(), reason))
            else:
                files.append(path.relative_to(root).as_posix())
    ignored = {kind: count for kind, count in sorted(ignored.items()) if count}
    listing = Listing(
        root=root, files=tuple(sorted(files)), folders=tuple(folders), refused=tuple(refused), ignored=ignored
    )
    refuse_empty(folder, listing)
    return listing


def refusal(path: Path, root: Path) -> str | None:
    """Why a file must not be opened, or None. Opening a pipe could wait for ever."""
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            return "a link that leads out of the folder"
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        return f"cannot be opened: {error}"
    return None if regular else "a pipe, device or folder, not a file"


def split_of(listing: Listing) -> tuple[str, str] | None:
    """("train/", folder of test images) where both hold images."""
    top = {file.split("/")[0] for file in listing.files if "/" in file}
    found = [name for name in TEST_FOLDERS if name in top]
    return ("train/", f"{found[0]}/") if "train" in top and found else None


def select_all(listing: Listing) -> Selection:
    """Every image, at any depth; only the training part where there is a test part."""
    if split_of(listing) is None:
        return Selection(name=listing.root.name, files=listing.files)
    files = tuple(file for file in listing.files if file.startswith("train/"))
    return Selection(name=f"{listing.root.name}/train", files=files)


def select_labelled(listing: Listing) -> Selection:
    """One folder a class, or that below `train/` and below a test folder."""
    split = split_of(listing)
    parts, depth = ("",) if split is None else split, 0 if split is None else 1
    files = tuple(file for file in listing.files if file.startswith(parts))
    folders = [f for f in listing.folders if f.count("/") == depth and f.startswith(parts)]
    class_names = tuple(sorted({folder.split("/")[depth] for folder in folders}))
    refuse_loose(listing.root, [file for file in files if file.count("/") == depth])
    refuse_one_class(listing.root, class_names)
    number = {name: label for label, name in enumerate(class_names)}
    labels = torch.tensor([number[file.split("/")[depth]] for file in files])
    is_test = None if split is None else torch.tensor([not file.startswith("train/") for file in files])
    refuse_small_classes(listing.root, labels, is_test, class_names)
    return Selection(name=listing.root.name, files=files, labels=labels, class_names=class_names, is_test=is_test)


# 2. decode


def shape_of(root: Path, files: Sequence[str], image_size: int | None, channels: int | None) -> tuple[int, int]:
    """(image size, channels) to decode at; headers are read only for what was left open."""
    if image_size is not None and channels is not None:
        return image_size, channels
    headers = [h for h in in_threads(lambda file: _header_or_none(root / file), files) if h is not None]
    sizes = {size for width, height, _ in headers for size in (width, height)}
    native = sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE
    auto_size = native if native <= NATIVE_SIZE_LIMIT else DEFAULT_SIZE
    auto_channels = 1 if headers and all(grey for _, _, grey in headers) else 3
    return image_size or auto_size, channels or auto_channels


def decode_all(
    root: Path, files: Sequence[str], image_size: int, channels: int, cache: Path | None, progress: Progress | None
) -> Decoded:
    shape = (len(files), channels, image_size, image_size)
    if cache is None:
        return decode_into(allocate(shape), root, files, progress)
    cache.mkdir(parents=True, exist_ok=True)
    key = cache_key(root, files, shape)
    pixels_path, facts_path = cache / f"{key}.pixels", cache / f"{key}.json"
    if (cached := read_cache(pixels_path, facts_path, shape)) is not None:
        return cached
    unfinished = cache / f"{key}.{os.getpid()}.unfinished"
    try:
        decoded = decode_into(allocate(shape, unfinished), root, files, progress)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, pixels_path)
    finally:
        unfinished.unlink(missing_ok=True)
    facts = {"all_grey": decoded.all_grey, "bad": {i: asdict(bad) for i, bad in decoded.bad.items()}}
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(unfinished, facts_path)
    return decoded


def decode_into(pixels: Tensor, root: Path, files: Sequence[str], progress: Progress | None) -> Decoded:
    """Fill row i with file i; a file that cannot be decoded leaves its row at zero and a reason behind."""
    rows = pixels.numpy()
    channels, image_size = pixels.shape[1:3]

    def decode_row(i: int) -> tuple[bool, BadImage | None]:
        try:
            rows[i] = decode(root / files[i], image_size, channels)
        except UNREADABLE as error:
            return True, BadImage(files[i], explain(error), sha256_of(root / files[i]))
        return channels == 1 or bool((rows[i] == rows[i, :1]).all()), None

    bad, all_grey = {}, True
    for i, (grey, problem) in enumerate(in_threads(decode_row, range(len(files)), progress)):
        all_grey &= grey
        if problem is not None:
            bad[i] = problem
    return Decoded(pixels=pixels, bad=bad, all_grey=all_grey)


def in_threads(work: Callable, items: Sequence, progress: Progress | None = None) -> list:
    """`map` over threads (Pillow decodes outside the interpreter lock), in order, a bounded number at a time."""
    results = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata; what matters is raised
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(items), CHUNK):
            results += pool.map(work, items[start : start + CHUNK])
            if progress is not None:
                progress(len(results), len(items))
    return results


def cache_key(root: Path, files: Sequence[str], shape: tuple[int, ...]) -> str:
    """Changes whenever a file is added, removed, renamed or written, or another shape is asked for."""
    digest = hashlib.sha256(repr((str(root), shape, Image.__version__)).encode())
    for file in files:
        status = (root / file).stat()
        digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:32]


def read_cache(pixels_path: Path, facts_path: Path, shape: tuple[int, ...]) -> Decoded | None:
    if not facts_path.is_file() or not pixels_path.is_file() or pixels_path.stat().st_size != np.prod(shape):
        return None
    try:
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
    except ValueError:  # torn by a crash of the machine
        return None
    pixels = np.memmap(pixels_path, dtype=np.uint8, mode="c", shape=shape)  # copy on write: the file stays as it is
    bad = {int(i): BadImage(**problem) for i, problem in facts["bad"].items()}
    return Decoded(pixels=torch.from_numpy(pixels), bad=bad, all_grey=facts["all_grey"])


def _header_or_none(path: Path) -> tuple[int, int, bool] | None:
    try:
        return read_header(path)
    except UNREADABLE:  # decoding will find it again and say why
        return None


# 3. refuse


def refuse_missing(folder: Path) -> None:
    if folder.is_dir():
        return
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    shipped = "images that need no folder: patchwork:garments"
    if str(folder).partition(":")[0] in SHIPPED:  # `open_images` takes these; who comes here does not
        raise UsageError(f"{folder}: only folders can be read here", expected="a folder of images", received=folder)
    raise UsageError(
        f"{folder}: {'this is a file' if folder.exists() else 'there is no such folder'}",
        expected="a folder of images",
        hint=f"{did_you_mean(folder.name, beside)}; {shipped}" if 0 < len(beside) <= 20 else shipped,
    )


def _refuse_closed(error: OSError) -> None:
    raise UsageError(f"{error.filename}: this folder cannot be read", received=error.strerror) from error


def refuse_empty(folder: Path, listing: Listing) -> None:
    if listing.files:
        return
    found = [f"{count} {kind}" for kind, count in listing.ignored.items()]
    found += [f"{bad.path!r}: {bad.reason}" for bad in listing.refused[:3]]
    raise UsageError(
        f"{folder}: no images in this folder",
        expected=f"files ending in {', '.join(SUFFIXES)}, at any depth",
        received=", ".join(found) or "nothing",
    )


def refuse_loose(folder: Path, loose: Sequence[str]) -> None:
    if loose:
        raise UsageError(
            f"{folder}: {len(loose)} images lie in no class folder, the first is {loose[0]!r}",
            expected="one folder a class, with that class's images inside",
            hint="move them into folders named after their class",
        )


def refuse_one_class(folder: Path, class_names: tuple[str, ...]) -> None:
    if len(class_names) == 1:
        raise UsageError(
            f"{folder}: only one class, {class_names[0]!r}",
            expected="at least two class folders",
            hint=f"if the classes are inside it, give {folder / class_names[0]}",
        )


def refuse_too_many(folder: Path, bad: tuple[BadImage, ...], total: int) -> None:
    if len(bad) <= MAX_BAD_SHARE * total:
        return
    shown = "; ".join(f"{b.path!r} ({b.reason})" for b in bad[:3])
    raise UnreadableImages(
        f"{folder}: {len(bad)} of {total} images cannot be used",
        bad,
        expected=f"at most {MAX_BAD_SHARE:.0%}",
        received=shown + ("; …" if len(bad) > 3 else ""),
        hint="repair or remove these files",
    )


def refuse_small_classes(
    folder: Path, labels: Tensor, is_test: Tensor | None, class_names: tuple[str, ...], least: int = 2
) -> None:
    training = labels if is_test is None else labels[~is_test]
    counts = torch.bincount(training, minlength=len(class_names)).tolist()
    small = [f"{name!r} has {count}" for name, count in zip(class_names, counts, strict=True) if count < least]
    if small:
        raise UsageError(
            f"{folder}: {len(small)} of {len(class_names)} classes have too few readable training images",
            expected=f"at least {least} a class",
            received=", ".join(small[:5]) + (", …" if len(small) > 5 else ""),
            hint="add images or remove the folder (links to folders are not followed)",
        )
