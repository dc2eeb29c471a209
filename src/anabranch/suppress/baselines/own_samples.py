# SPDX-License-Identifier: Apache-2.0
"""A model's own samples, stopped on the way: what it is trained on where there are no images.

Shapes    : B rows; noise (B, C, h, w); stop (B,) steps of the sampler, 0 .. num_steps - 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.models.diffusion.conditioning import concatenate
from anabranch.models.diffusion.family import denoiser, family
from anabranch.suppress.guidance import Guidance, shifted


class Noisy(NamedTuple):
    latents: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)


@torch.no_grad()
def partly_sampled(pipe: Any, guidance: Guidance, noise: Tensor, stop: Tensor, num_steps: int) -> Noisy:
    """What the denoiser is given in step `stop` of sampling, for every row its own step."""
    network, scheduler = denoiser(pipe), pipe.scheduler
    scheduler.set_timesteps(num_steps, device=network.device, **shifted(pipe, noise))
    latents = (noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(network.device, network.dtype)
    kept, last = torch.empty_like(latents), int(stop.max())
    for step, timestep in enumerate(scheduler.timesteps[: last + 1]):
        scale = getattr(scheduler, "scale_model_input", lambda inputs, timestep: inputs)
        inputs = scale(latents, timestep)
        kept[stop == step] = inputs[stop == step]
        if step < last:
            branches = guidance.branches(step / num_steps)
            inputs = torch.cat([inputs] * len(branches))
            output = family(pipe).predict(pipe, inputs, timestep, concatenate(branches))
            guided = guidance.combine(output.chunk(len(branches)), step).to(latents.dtype)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
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
