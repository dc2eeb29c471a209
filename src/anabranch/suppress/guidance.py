# SPDX-License-Identifier: Apache-2.0
"""Sampling with guidance: one loop for every rule that combines several prompts in one step.

Paper     : classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598); negative prompts as in diffusers.
Equation  : Negative     eps(n) + s (eps(y) - eps(n))
            ThreeBranch  eps(0) + s (eps(y) - eps(0)) - s_n (eps(n) - eps(0))
            outside of the steps [from, until) of the run the empty prompt stands for n
Shapes    : B images; latents (B, c, h, w); a branch is a prompt a row.
Differs   : nothing; all branches go through the denoiser in one batch, as the stock pipelines do it.
Check     : bit for bit the stock pipelines' images; s = 1 ignores the negative; s_n = 0 is plain guidance
            (tests/suppress/test_guidance.py).
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.diffusion.conditioning import Conditioning, concatenate
from anabranch.models.diffusion.family import WITHOUT_GUIDANCE, denoiser, family
from anabranch.models.diffusion.latents import to_pixels


class Guidance(Protocol):
    def branches(self, progress: float) -> Sequence[Conditioning]:
        """The prompts of this step, each with a row an image; progress runs from 0 to 1 over the steps."""
        ...

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        """What the scheduler is given, from the denoiser's outputs of the branches."""
        ...


@dataclass(kw_only=True)
class Negative:
    """Classifier-free guidance away from a negative prompt."""

    positive: Conditioning
    negative: Conditioning
    empty: Conditioning | None = None
    scale: float = 7.5
    window: tuple[float, float] = (0.0, 1.0)
    """Share of the run in which the negative prompt stands; `empty` before and after it."""

    def branches(self, progress: float) -> Sequence[Conditioning]:
        if self.scale <= 1:
            return [self.positive]
        inside = self.window[0] <= progress < self.window[1] or self.empty is None
        return [self.negative if inside else self.empty, self.positive]

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        away, towards = outputs
        return away + self.scale * (towards - away)


@dataclass(kw_only=True)
class ThreeBranch:
    """Guidance with a strength of its own for what is to be avoided; one more forward pass a step."""

    positive: Conditioning
    negative: Conditioning
    empty: Conditioning
    scale: float = 7.5
    negative_scale: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)

    def branches(self, progress: float) -> Sequence[Conditioning]:
        if self.negative_scale == 0 or not self.window[0] <= progress < self.window[1]:
            return [self.empty, self.positive]
        return [self.empty, self.positive, self.negative]

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        base, towards, *avoided = outputs
        guided = base + self.scale * (towards - base)
        return guided - self.negative_scale * (avoided[0] - base) if avoided else guided


def check_guidance(pipe: Any, scale: float) -> None:
    """A negative prompt that would do nothing is refused."""
    name = type(pipe).__name__
    network = denoiser(pipe)
    distilled = (
        name in WITHOUT_GUIDANCE or network.config.get("time_cond_proj_dim") or network.config.get("guidance_embeds")
    )
    if scale <= 1 or distilled:
        raise UsageError(
            "a negative prompt does nothing without guidance",
            expected="guidance above 1, in a model that is guided by two passes",
            received="a model distilled to run without it" if distilled else f"guidance {scale:g}",
            hint="anabranch erase bake writes a LoRA that needs no negative prompt",
        )


def first_noise(pipe: Any, seeds: Sequence[int]) -> Tensor:
    """(B, c, h, w) one seed an image, as the stock pipelines draw it with one generator an image."""
    side = family(pipe).latent_size(pipe)
    shape = (1, denoiser(pipe).config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(pipe: Any, guidance: Guidance, noise: Tensor, steps: int, seeds: Sequence[int] | None = None) -> Tensor:
    """Latents after `steps` of the pipeline's scheduler.

    seeds    of a scheduler that draws noise of its own, one an image.
    """
    *_, latents = trajectory(pipe, guidance, noise, steps, seeds)
    return latents


def trajectory(
    pipe: Any, guidance: Guidance, noise: Tensor, steps: int, seeds: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """The latents before every step and after the last; a step is computed once it is asked for."""
    network, scheduler, module = denoiser(pipe), pipe.scheduler, family(pipe)
    scheduler.set_timesteps(steps, device=network.device, **shifted(pipe, noise))
    latents = (noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(network.device, network.dtype)
    extra = {}
    if seeds is not None and "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    for step, timestep in enumerate(scheduler.timesteps):
        yield latents
        branches = guidance.branches(step / len(scheduler.timesteps))
        inputs = scaled(pipe, torch.cat([latents] * len(branches)), timestep)
        output = module.predict(pipe, inputs, timestep, concatenate(branches))
        guided = guidance.combine(output.chunk(len(branches)), step).to(latents.dtype)  # autocast answers in its own
        latents = scheduler.step(guided, timestep, latents, return_dict=False, **extra)[0]
    yield latents


def scaled(pipe: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """What the denoiser is given for these latents."""
    scheduler = pipe.scheduler
    return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents


def shifted(pipe: Any, noise: Tensor) -> dict[str, float]:
    """What a scheduler that shifts by the size of the picture has to be told."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    patch = denoiser(pipe).config.get("patch_size", 1)
    tokens = (noise.shape[-1] // patch) * (noise.shape[-2] // patch)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return {"mu": calculate_shift(tokens, *(config[name] for name in names))}


def pictures(pipe: Any, guidance: Guidance, noise: Tensor, steps: int, seeds: Sequence[int] | None = None) -> Tensor:
    """(B, C, S, S) uint8."""
    return to_pixels(pipe, sample(pipe, guidance, noise, steps, seeds))
