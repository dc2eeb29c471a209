# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from anabranch.data.gratings import CLASS_NAMES, FREQUENCIES, ORIENTATIONS, gratings


def spectrum_class(image):
    """The class whose wave explains most of the image, whatever its phase: largest |<image, exp(i k x)>|."""
    size = image.shape[-1]
    v, u = np.mgrid[:size, :size] / size
    energies = []
    for degrees in ORIENTATIONS:
        for cycles in FREQUENCIES:
            angle = np.deg2rad(degrees)
            wave = np.exp(2j * np.pi * cycles * (u * np.cos(angle) + v * np.sin(angle)))
            energies.append(abs(((image - image.mean()) * wave).sum()))
    return int(np.argmax(energies))


def test_the_spectrum_tells_the_class_and_single_pixels_do_not():
    pixels, labels = gratings(1200, seed=0)
    found = [spectrum_class(image) for image in pixels[:120, 0].double().numpy()]
    assert np.mean(np.array(found) == labels[:120].numpy()) > 0.95
    flat = pixels.flatten(1).numpy() / 255.0
    linear = LogisticRegression(C=0.1, max_iter=200).fit(flat[:600], labels[:600])
    assert linear.score(flat[600:], labels[600:]) < 0.25


def test_classes_come_in_turn_and_the_seed_decides_the_rest():
    pixels, labels = gratings(25, seed=3)
    assert labels.tolist() == [i % 12 for i in range(25)]
    assert len(CLASS_NAMES) == 12
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (25, 1, 28, 28))
    assert torch.equal(pixels, gratings(25, seed=3)[0])
    assert not torch.equal(pixels, gratings(25, seed=4)[0])


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()
    gratings(4, seed=0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])
