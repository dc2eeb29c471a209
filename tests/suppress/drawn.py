# SPDX-License-Identifier: Apache-2.0
"""Small pipelines and what is done with them, drawn from a generator, for the contract."""

import torch

from anabranch.models.diffusion.family import denoiser
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.guidance import Negative, first_noise, sample
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import CAPTIONS, latents_of

BATCH = 4


def seed(g) -> int:
    return int(torch.randint(1000, (), generator=g))


def pipeline(g, family="stable_diffusion"):
    return tiny(family, seed(g))


def base():
    """The one that several are trained from."""
    return tiny("stable_diffusion", 0)


def latents(pipe, g):
    return latents_of(pipe, seed(g))


def moved(training, g):
    """As after some steps: of a LoRA nothing learns in its first half while the other one is zero."""
    with torch.no_grad():
        for value in training.objective.parameters():
            value += 0.05 * torch.randn(value.shape, generator=g)
    return training


def pictured(pipe, steps=2):
    """Latents of two prompts."""
    positive, negative = encode_prompts(pipe, ["a dress", "a bag"]), encode_prompts(pipe, ["", ""])
    return sample(pipe, Negative(positive=positive, negative=negative, scale=2.0), first_noise(pipe, [3, 11]), steps)


def weights(pipe):
    return denoiser(pipe).state_dict()


__all__ = ["BATCH", "CAPTIONS", "latents", "moved", "pictured", "pipeline", "seed", "weights"]
