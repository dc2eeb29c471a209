# SPDX-License-Identifier: Apache-2.0
"""Noisy gratings: a generated domain whose low-level statistics differ from those of pictures.

Equation  : x(u, v) = 1/2 + a sin(2 pi f (u cos t + v sin t) / S + p) + n,   n ~ N(0, noise^2) at every pixel
Classes   : 12 = 6 orientations t (0, 30, … 150 degrees) x 2 frequencies f (2 and 4 cycles an image).
Random    : phase p in [0, 2 pi), contrast a in [0.1, 0.2]: neither tells the class.
Shapes    : N images, 1 channel, S x S pixels, 8 bit.
Check     : the class cannot be read from single pixels (a linear classifier stays near chance, 1/12), but can from the
            Fourier spectrum (tests/data/test_gratings.py).
"""

import numpy as np
import torch
from torch import Tensor

ORIENTATIONS = (0, 30, 60, 90, 120, 150)
FREQUENCIES = (2, 4)
CLASS_NAMES = tuple(f"{degrees}deg-{cycles}cycles" for degrees in ORIENTATIONS for cycles in FREQUENCIES)
CONTRAST = (0.1, 0.2)
NOISE = 0.25


def gratings(num_images: int, seed: int, image_size: int = 28) -> tuple[Tensor, Tensor]:
    """((N, 1, S, S) uint8, (N,) labels), the classes in turn."""
    generator = np.random.default_rng(seed)
    labels_N = np.arange(num_images) % len(CLASS_NAMES)
    angle_N = np.deg2rad(np.take(ORIENTATIONS, labels_N // len(FREQUENCIES)))[:, None, None]
    cycles_N = np.take(FREQUENCIES, labels_N % len(FREQUENCIES))[:, None, None]
    phase_N = generator.uniform(0, 2 * np.pi, (num_images, 1, 1))
    contrast_N = generator.uniform(*CONTRAST, (num_images, 1, 1))

    v_SS, u_SS = np.mgrid[:image_size, :image_size] / image_size
    wave_NSS = np.sin(2 * np.pi * cycles_N * (u_SS * np.cos(angle_N) + v_SS * np.sin(angle_N)) + phase_N)
    noise_NSS = generator.normal(0, NOISE, wave_NSS.shape)
    pixels_NSS = ((0.5 + contrast_N * wave_NSS + noise_NSS) * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels_NSS[:, None]), torch.from_numpy(labels_N)
