# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoding of an image folder: the plain model that every expert is compared with.

Paper     : He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377).
Equation  : see models/vit_mae; hide a share of the patches at random, predict their pixels from the visible ones.
Shapes    : B images a batch, L patches; the hiding order is (B, L) noise, drawn for the global batch.
Differs   : crops and flips are an option, off by default: the shipped images are centred, 28 pixels small, and not all
            of them mean the same mirrored.
Check     : one process and two see the same batches (tests/specialize/test_mae.py).
Exempt    : off (nothing is added that could be switched off)
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from anabranch.data.augment import random_resized_crop
from anabranch.data.images import Images
from anabranch.data.streams import derived_seed
from anabranch.models.vit_mae import check_images, masked_loss, normalise, num_patches

FAMILY = "vit_mae"
OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY = "adamw", 4e-3, 0.05
"""Peak of AdamW for the small presets at batches of 64."""


class Indices(Protocol):
    """Which images a step sees: a pure function of the step."""

    def at(self, step: int) -> Tensor: ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step, whatever ran before it."""
    return torch.Generator().manual_seed(derived_seed("step", seed, step))


class MaskedImages:
    """The global batch of a step: pixels (B, C, S, S) uint8, hiding noise (B, L), ids (B,) of what images belong to."""

    def __init__(
        self,
        images: Images,
        indices: Indices,
        *,
        num_patches: int,
        seed: int,
        augment: bool = False,
        ids: dict[str, Tensor] | None = None,
    ):
        self.images, self.indices, self.num_patches = images, indices, num_patches
        self.seed, self.augment, self.ids = seed, augment, ids or {}

    def batch(self, step: int) -> dict[str, Tensor]:
        chosen_B = self.indices.at(step)
        generator = step_generator(self.seed, step)
        pixels = self.images.store.read(chosen_B)
        if self.augment:
            pixels = random_resized_crop(pixels, generator)
        return {
            "pixels": pixels,
            "noise": torch.rand(len(chosen_B), self.num_patches, generator=generator),
            "row": torch.arange(len(chosen_B)),
            "step": torch.full((len(chosen_B),), step),
            **{name: values[chosen_B] for name, values in self.ids.items()},
        }


class MaskedAutoencoding(nn.Module):
    """Objective: batch of `MaskedImages` -> {"loss": ()}."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixel_values = normalise(batch["pixels"])
        return {"loss": masked_loss(self.model, pixel_values, batch["noise"]).loss}


def masked_images(
    images: Images, model: nn.Module, indices: Indices, *, seed: int, augment: bool = False, **ids: Tensor
) -> MaskedImages:
    """The stream for this model, after checking that the images fit it."""
    check_images(model, image_size=images.image_size, channels=images.channels, name=images.name)
    return MaskedImages(images, indices, num_patches=num_patches(model), seed=seed, augment=augment, ids=ids)


def objective(model: nn.Module, *, seed: int) -> nn.Module:
    """As every learner builds its own; the hiding order comes with the batch, so the seed decides nothing here."""
    return MaskedAutoencoding(model)


stream = masked_images
