# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anabranch.data import patchwork
from anabranch.data.images import open_images
from anabranch.data.patchwork import DOMAINS, FOLDER, crops, export, load
from anabranch.errors import UsageError


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_is_balanced_split_and_without_test_images_in_training(domain):
    images = load(domain)
    pixels = images.store.read(torch.arange(3000))
    assert pixels.shape == (3000, 1, 28, 28)
    assert images.is_test.tolist() == [False] * 2000 + [True] * 1000
    for part, total in ((~images.is_test, 2000), (images.is_test, 1000)):
        counts = torch.bincount(images.labels[part], minlength=len(images.class_names))
        assert counts.sum() == total
        assert counts.max() - counts.min() <= 1
    training = {tile.numpy().tobytes() for tile in pixels[:2000]}
    assert len(training) == 2000
    assert not any(tile.numpy().tobytes() in training for tile in pixels[2000:])
    assert torch.equal(pixels, load(domain).store.read(torch.arange(3000)))


@pytest.mark.parametrize(("domain", "least"), [("garments", 0.7), ("animals", 0.7), ("digits", 0.85)])
def test_labels_belong_to_their_images(domain, least):
    """The nearest training image has the same label far more often than one time in ten."""
    images = load(domain)
    x = images.store.read(torch.arange(3000)).flatten(1).float()
    nearest = torch.cdist(x[2000:], x[:2000]).argmin(1)
    assert (images.labels[:2000][nearest] == images.labels[2000:]).float().mean() > least


def test_training_and_test_crops_of_a_photograph_share_no_pixel():
    noise = np.random.default_rng(0).integers(0, 256, (90, 180), dtype=np.uint8)
    other_right, other_left = noise.copy(), noise.copy()
    other_right[:, 90:] ^= 255
    other_left[:, :90] ^= 255
    np.testing.assert_array_equal(crops(noise, "train", 50), crops(other_right, "train", 50))
    np.testing.assert_array_equal(crops(noise, "test", 50), crops(other_left, "test", 50))
    assert len({crop.tobytes() for crop in crops(noise, "train", 50)}) == 50


def test_flat_crops_are_left_out():
    photograph = np.full((100, 200), 90, np.uint8)
    photograph[:40, :60] = np.random.default_rng(0).integers(0, 255, (40, 60))
    assert (np.ptp(crops(photograph, "train", 20), axis=(1, 2)) >= patchwork.LEAST_RANGE).all()


def test_sheets_can_be_looked_at_and_every_file_has_a_licence():
    contents = json.loads((FOLDER / "patchwork.json").read_text())
    assert set(contents) == set(DOMAINS) - {"gratings"}
    for domain, about in contents.items():
        assert (FOLDER / "LICENSES" / f"{domain}.txt").stat().st_size > 500
        assert about["licence"]
        assert about["source"]
    for name in contents["textures"]["classes"]:
        assert f"{name}.png" in (FOLDER / "LICENSES" / "textures.txt").read_text()
    with Image.open(FOLDER / "digits-test.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (1400, 560))
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 4_000_000


def test_exported_folders_open_as_tasks_with_the_same_pixels(tmp_path):
    export("digits", tmp_path / "digits")
    back = open_images(tmp_path / "digits", labelled=True)
    images = load("digits")
    assert (back.image_size, back.channels, back.class_names) == (28, 1, images.class_names)
    rows = torch.tensor([int(Path(file).stem) for file in back.files])
    assert torch.equal(back.store.read(torch.arange(3000)), images.store.read(rows))
    assert torch.equal(back.labels, images.labels[rows])
    assert torch.equal(back.is_test, images.is_test[rows])
    with pytest.raises(UsageError, match="already there"):
        export("digits", tmp_path / "digits")


def test_unknown_domain_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean textures"):
        load("texture")
