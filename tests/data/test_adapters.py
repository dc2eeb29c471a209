# SPDX-License-Identifier: Apache-2.0
import gzip
import struct

import numpy as np
import pytest
import torch

from anabranch.data import adapters
from anabranch.data.adapters import CORPORA, load, read_animal_numbers, read_idx
from anabranch.data.images import open_images
from anabranch.errors import UsageError


def load_or_skip(name):
    try:
        return load(name)
    except UsageError as error:
        pytest.skip(str(error))


SHAPES = {"fashion-mnist": 70_000, "animal-shapes": 10_000, "mnist-5k": 5_000, "sklearn-digits": 1_797}


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_have_ten_labelled_classes_at_28_pixels(name):
    images = load_or_skip(name)
    assert (len(images), images.channels, images.image_size) == (SHAPES[name], 1, 28)
    assert (images.labels.bincount() > 0.9 * len(images) / 10).all()
    assert len(images.class_names) == 10
    assert images.store.read(torch.arange(100)).max() >= 250


@pytest.mark.parametrize("name", ["animal-shapes", "mnist-5k"])
def test_labels_belong_to_their_images(name):
    images = load_or_skip(name)
    x = images.store.read(torch.arange(len(images))).flatten(1).float()[::4]
    y = images.labels[::4]
    apart = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert (y[apart.argmin(1)] == y).float().mean() > 0.7


def test_fashion_mnist_keeps_its_own_test_part():
    images = load_or_skip("fashion-mnist")
    assert images.is_test.nonzero()[:, 0].tolist() == list(range(60_000, 70_000))


def test_sklearn_digits_look_like_their_8_by_8_originals():
    from sklearn.datasets import load_digits

    pixels = open_images("corpus:sklearn-digits", labelled=True).store.read(torch.arange(200)).float()
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, 8)[:, 0]
    original = torch.from_numpy(load_digits().images[:200]).float() * 255 / 16
    assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("name", ["animal-shapes", "mnist-5k", "fashion-mnist"])
def test_a_missing_package_names_the_install_command(name, monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "find_spec", lambda module: None)
    monkeypatch.setattr(adapters, "FASHION_FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"not installed(.*\n)*.*try: (pip|apt) install"):
        open_images(f"corpus:{name}")


def test_idx_reader_gives_the_array_and_refuses_damage(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = struct.pack(">HBBIII", 0, 8, 3, 2, 3, 4) + array.tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
    np.testing.assert_array_equal(read_idx(tmp_path / "x.gz"), array)
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(UsageError, match="damaged"):
        read_idx(tmp_path / "x.gz")


def test_an_animal_file_with_other_bytes_is_never_parsed(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"cos\nsystem\n(S'true'\ntR."))
    with pytest.raises(UsageError, match="not the file of animal-shape-mnist"):
        read_animal_numbers(tmp_path / "x.gz", adapters.ANIMAL_FILES["animal_data_version_3.gz"], "u1")
