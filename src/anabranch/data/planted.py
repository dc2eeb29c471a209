# SPDX-License-Identifier: Apache-2.0
"""A planted conflict: one shipped domain written in many pixel codes, each easier for a model that reads no other.

Spec      : `planted:garments-3` is `patchwork:garments` in code 3: the same images, labels and split.
Equation  : x'_li = x_q(l)p(i) where s_i = +1, 255 - x_q(l)p(i) where s_i = -1; a code is the order q of patches and,
            alike in all of them, the order p and the signs s of their pixels. A linear patch embedding reads a code as
            well as the original, by reordering and negating its columns; to read all, it needs the columns of all.
Shapes    : N images, 1 channel, S x S pixels; L = 16 patches of P = 49 pixels, as preset `tiny` cuts 28 x 28 images.
Check     : decoding gives the domain back, pixel for pixel (tests/data/test_planted.py); one model a code beats the
            shared model at equal images and steps (tests/jobs/transfer/test_planted.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.data import patchwork
from anabranch.data.images import Images, Store
from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError, did_you_mean

GRID, PATCH_SIZE = 4, 7


@dataclass(frozen=True, eq=False)
class Code:
    patches_L: Tensor
    """(L,) int64, a permutation: where patch l of an image comes from."""
    pixels_P: Tensor
    """(P,) int64, a permutation: where pixel i of a patch comes from."""
    negative_P: Tensor
    """(P,) bool: the pixels that are inverted; half of them, rounded down."""


def code(number: int) -> Code:
    """Code `number`, a pure function of it."""
    generator = torch.Generator().manual_seed(derived_seed("planted", number))
    num_pixels = PATCH_SIZE**2
    return Code(
        patches_L=torch.randperm(GRID**2, generator=generator),
        pixels_P=torch.randperm(num_pixels, generator=generator),
        negative_P=torch.randperm(num_pixels, generator=generator) < num_pixels // 2,
    )


def write(pixels: Tensor, code: Code) -> Tensor:
    """x'_li = x_q(l)p(i), inverted where s_i = -1; (N, 1, S, S) uint8 in and out."""
    patches_NLP = to_patches(pixels)[:, code.patches_L][..., code.pixels_P]
    return from_patches(torch.where(code.negative_P, 255 - patches_NLP, patches_NLP))


def read(pixels: Tensor, code: Code) -> Tensor:
    """The inverse of `write`."""
    patches_NLP = to_patches(pixels)
    plain_NLP = torch.where(code.negative_P, 255 - patches_NLP, patches_NLP)
    return from_patches(plain_NLP[..., code.pixels_P.argsort()][:, code.patches_L.argsort()])


def to_patches(pixels: Tensor) -> Tensor:
    """(N, 1, S, S) -> (N, L, P)."""
    grid = pixels.reshape(len(pixels), GRID, PATCH_SIZE, GRID, PATCH_SIZE).transpose(2, 3)
    return grid.reshape(len(pixels), GRID**2, PATCH_SIZE**2)


def from_patches(patches_NLP: Tensor) -> Tensor:
    """(N, L, P) -> (N, 1, S, S)."""
    grid = patches_NLP.reshape(len(patches_NLP), GRID, GRID, PATCH_SIZE, PATCH_SIZE).transpose(2, 3)
    return grid.reshape(len(patches_NLP), 1, GRID * PATCH_SIZE, GRID * PATCH_SIZE)


def load(name: str) -> Images:
    """`garments-3`: the domain of that name in that code."""
    domain, _, number = name.rpartition("-")
    if domain not in patchwork.DOMAINS or not number.isdecimal():
        raise UsageError(
            f"planted:{name}: unknown", expected="planted:DOMAIN-NUMBER, such as planted:garments-3", received=name,
            hint=did_you_mean(domain or name, patchwork.DOMAINS),
        )  # fmt: skip
    images = patchwork.load(domain)
    pixels = write(images.store.read(torch.arange(len(images))), code(int(number)))
    return replace(images, name=name, store=Store.of(pixels))
