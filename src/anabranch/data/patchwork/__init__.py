# SPDX-License-Identifier: Apache-2.0
"""Patchwork: five small labelled domains that ship with the package, so that everything can be tried offline.

Domains   : garments, animals (silhouettes), digits, textures (crops of photographs), gratings (generated).
Size      : 2,000 training and 1,000 test images each, 28 x 28, grey, the same number (give or take one) of each class.
Files     : garments, animals and digits are sheets of 50 tiles a row, sorted by class; textures are whole photographs,
            of which the left half gives training crops and the right half test crops. `patchwork.json` names classes,
            sources and licences; the licence texts are in `LICENSES`.
Rebuilt   : by scripts/build_patchwork.py from the published data sets.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anabranch.data.gratings import CLASS_NAMES as GRATING_CLASSES
from anabranch.data.gratings import gratings
from anabranch.data.images import Images, Store
from anabranch.errors import UsageError, did_you_mean

DOMAINS: tuple[str, ...] = ("garments", "animals", "digits", "textures", "gratings")
FOLDER = Path(__file__).parent
IMAGE_SIZE, TILES_A_ROW = 28, 50
NUM_IMAGES = {"train": 2000, "test": 1000}
CROP_STRIDE, LEAST_RANGE = 3, 48
"""Texture crops start at every third pixel; less than 48 grey levels between darkest and brightest is flat."""


def load(domain: str) -> Images:
    """All 3,000 images of a domain, training images first."""
    if domain not in DOMAINS:
        raise UsageError(f"patchwork:{domain}: unknown domain", received=domain, hint=did_you_mean(domain, DOMAINS))
    pixels, labels = zip(*(_part(domain, part) for part in NUM_IMAGES), strict=True)
    return Images(
        name=domain,
        store=Store.of(torch.cat(pixels)),
        labels=torch.cat(labels),
        class_names=class_names(domain),
        is_test=torch.arange(sum(map(len, labels))) >= len(labels[0]),
    )


def class_names(domain: str) -> tuple[str, ...]:
    return GRATING_CLASSES if domain == "gratings" else tuple(_contents()[domain]["classes"])


def export(domain: str, folder: Path) -> None:
    """Write a domain as PNG files, FOLDER/train/CLASS/0000.png and FOLDER/test/CLASS/2000.png, to try commands on."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: already there", expected="a new or empty folder", hint="choose another name")
    images = load(domain)
    for row in range(len(images)):
        part = "test" if images.is_test[row] else "train"
        path = folder / part / images.class_names[images.labels[row]] / f"{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.store.read(torch.tensor([row]))[0, 0].numpy()).save(path)


def _part(domain: str, part: str) -> tuple[Tensor, Tensor]:
    """((N, 1, 28, 28) uint8, (N,) labels) of the training or the test part."""
    if domain == "gratings":
        return gratings(NUM_IMAGES[part], seed=list(NUM_IMAGES).index(part))
    names = class_names(domain)
    each = NUM_IMAGES[part] // len(names)
    if domain == "textures":
        tiles = np.concatenate([crops(_grey(f"textures/{name}.png"), part, each) for name in names])
    else:
        tiles = cut_sheet(_grey(f"{domain}-{part}.png"))
    return torch.from_numpy(tiles[:, None].copy()), torch.arange(len(names)).repeat_interleave(each)


def cut_sheet(sheet: np.ndarray) -> np.ndarray:
    """(N, 28, 28) tiles, row by row."""
    rows = len(sheet) // IMAGE_SIZE
    tiles = sheet.reshape(rows, IMAGE_SIZE, TILES_A_ROW, IMAGE_SIZE).swapaxes(1, 2)
    return tiles.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)


def crops(photograph: np.ndarray, part: str, num_crops: int) -> np.ndarray:
    """Crops spread evenly over one half of a photograph, flat places left out."""
    middle = photograph.shape[1] // 2
    half = photograph[:, :middle] if part == "train" else photograph[:, middle:]
    windows = np.lib.stride_tricks.sliding_window_view(half, (IMAGE_SIZE, IMAGE_SIZE))
    windows = windows[::CROP_STRIDE, ::CROP_STRIDE].reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    windows = windows[np.ptp(windows, axis=(1, 2)) >= LEAST_RANGE]
    return windows[np.arange(num_crops) * len(windows) // num_crops]


def _grey(name: str) -> np.ndarray:
    with Image.open(FOLDER / name, formats=("PNG",)) as picture:
        return np.asarray(picture)


@cache
def _contents() -> dict[str, dict]:
    return json.loads((FOLDER / "patchwork.json").read_text(encoding="utf-8"))
