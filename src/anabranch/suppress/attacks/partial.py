# SPDX-License-Identifier: Apache-2.0
"""Partial noising: start from a picture with the concept, noise it part of the way, and sample the rest.

Paper     : SDEdit, Meng et al. 2021 (arXiv 2108.01073), as an attack on erased models cf. arXiv 2505.17013, 2506.08991.
Equation  : z_k = noise(z, eps, t_k), k = steps - floor(strength steps);  the sampler's own steps from t_k on
Shapes    : B pictures; latents and noise (B, c, h, w).
Differs   : nothing; what is done is what the stock image-to-image pipelines do.
Check     : bit for bit the stock pipeline's latents (tests/suppress/attacks/test_partial.py).
Exempt    : off (at strength 0 nothing is sampled: refused)
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.models.diffusion.conditioning import concatenate
from anabranch.models.diffusion.family import denoiser, family
from anabranch.suppress.guidance import Guidance, shifted

STRENGTHS = (0.3, 0.5, 0.7)


@torch.no_grad()
def sample_from(
    pipe: Any,
    guidance: Guidance,
    latents: Tensor,
    noise: Tensor,
    steps: int,
    strength: float,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Latents after the last `strength` of the steps, from latents that were noised so far.

    seeds    of a scheduler that draws noise of its own, one a picture.
    """
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise ValueError(f"strength: expected in (0, 1] and a step at least, received {strength} of {steps} steps")
    network, scheduler = denoiser(pipe), pipe.scheduler
    scheduler.set_timesteps(steps, device=network.device, **shifted(pipe, noise))
    start = (steps - int(steps * strength)) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    latents, noise = (part.to(network.device, network.dtype) for part in (latents, noise))
    latents = noised(scheduler, latents, noise, timesteps[:1].expand(len(latents)))
    extra = {}
    if seeds is not None and "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    for step, timestep in enumerate(timesteps, start):
        branches = guidance.branches(step / len(scheduler.timesteps))
        inputs = torch.cat([latents] * len(branches))
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, timestep)
        output = family(pipe).predict(pipe, inputs, timestep, concatenate(branches))
        guided = guidance.combine(output.chunk(len(branches)), step)
        latents = scheduler.step(guided, timestep, latents, return_dict=False, **extra)[0]
    return latents


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """As the scheduler itself noises; flow-matching ones call it scaling."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(latents, timestep, noise)
    return scheduler.add_noise(latents, noise, timestep)
