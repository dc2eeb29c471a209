# SPDX-License-Identifier: Apache-2.0
"""A model's own samples, stopped on the way: what it is trained on where there are no images.

Shapes    : B rows; noise (B, C, h, w); stop (B,) steps of the sampler, 0 .. num_steps - 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.models.diffusion.family import denoiser, family
from anabranch.suppress.guidance import Guidance, scaled, trajectory


class Noisy(NamedTuple):
    latents: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)


@torch.no_grad()
def partly_sampled(pipe: Any, guidance: Guidance, noise: Tensor, stop: Tensor, num_steps: int) -> Noisy:
    """What the denoiser is given in step `stop` of sampling, for every row its own step."""
    scheduler, kept = pipe.scheduler, torch.empty_like(noise, device=denoiser(pipe).device, dtype=denoiser(pipe).dtype)
    walk = trajectory(pipe, guidance, noise, num_steps)
    for step, latents in zip(range(int(stop.max()) + 1), walk, strict=False):  # no step is taken after the last stop
        kept[stop == step] = scaled(pipe, latents, scheduler.timesteps[step])[stop == step]
    return Noisy(kept, scheduler.timesteps[stop])


class OwnSamples:
    """Stream: what samples start from, and the step before which each of them stops."""

    def __init__(self, pipe: Any, batch_size: int, num_steps: int, seed: int):
        side = family(pipe).latent_size(pipe)
        self.shape = (batch_size, denoiser(pipe).config.in_channels, side, side)
        self.num_steps, self.seed = num_steps, seed

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("own samples", self.seed, step))
        stop = torch.randint(self.num_steps, self.shape[:1], generator=generator)
        return {"noise": torch.randn(self.shape, generator=generator), "stop": stop}
