# SPDX-License-Identifier: Apache-2.0
"""Safe Latent Diffusion: guidance that steers away from a concept where the prompt moves towards it.

Paper     : Schramowski et al. 2022 (arXiv 2211.05105), eq. 3-8.
Equation  : mu = min(1, s_S |eps(y) - eps(S)|) where eps(y) - eps(S) < threshold, else 0
            gamma = mu (eps(S) - eps("")) + s_m nu;   nu <- b nu + (1 - b) gamma
            eps("") + s (eps(y) - eps("") - gamma), gamma left out in the first `warmup` steps
Shapes    : B images; latents (B, C, h, w); mu, gamma and the momentum nu like them.
Differs   : warm-up of a preset is scaled from the paper's 50 steps. Threshold and s_S are meant for noise predictions;
            velocities are met by the same numbers.
Check     : the stock pipeline's images; strength 0 is plain guidance bit for bit
            (tests/suppress/baselines/test_sld.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.guidance import check_guidance

PAPER_STEPS = 50
PRESETS = {
    "weak": {"warmup": 15, "strength": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_beta": 0.0},
    "medium": {"warmup": 10, "strength": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4},
    "strong": {"warmup": 7, "strength": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_beta": 0.7},
    "max": {"warmup": 0, "strength": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum_beta": 0.7},
}


def safety_scale(towards: Tensor, unsafe: Tensor, strength: float, threshold: float) -> Tensor:
    """mu = min(1, s_S |eps(y) - eps(S)|) where eps(y) - eps(S) < threshold, else 0"""
    difference = towards - unsafe
    return (strength * difference.abs()).clamp(max=1.0).where(difference < threshold, 0.0)


@dataclass(kw_only=True)
class Safe:
    """Rule of `anabranch.suppress.guidance.sample`; its momentum begins anew with every sampling."""

    positive: Conditioning
    unsafe: Conditioning
    empty: Conditioning
    scale: float = 7.5
    strength: float = 1000.0
    """s_S; 0 is plain guidance."""
    warmup: int = 10
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4
    momentum: Tensor | None = field(default=None, init=False, repr=False)

    def branches(self, progress: float) -> Sequence[Conditioning]:
        return [self.empty, self.positive] if self.strength == 0 else [self.empty, self.positive, self.unsafe]

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        base, towards, *unsafe = outputs
        guidance = towards - base
        if unsafe:
            gamma = self.safety_guidance(base, towards, unsafe[0], step)
            guidance = guidance - gamma if step >= self.warmup else guidance
        return base + self.scale * guidance

    def safety_guidance(self, base: Tensor, towards: Tensor, unsafe: Tensor, step: int) -> Tensor:
        """gamma = mu (eps(S) - eps("")) + s_m nu, after which nu moves towards gamma."""
        momentum = torch.zeros_like(base) if step == 0 or self.momentum is None else self.momentum
        mu = safety_scale(towards, unsafe, self.strength, self.threshold)
        gamma = mu * (unsafe - base) + self.momentum_scale * momentum
        self.momentum = self.momentum_beta * momentum + (1 - self.momentum_beta) * gamma
        return gamma


def guidance(
    pipe: Any,
    captions: Sequence[str],
    concept: str,
    scale: float,
    *,
    preset: str = "medium",
    num_steps: int = PAPER_STEPS,
) -> Safe:
    """The rule for these captions with a preset of the paper, its warm-up scaled to the steps of the run.

    Raises:
        UsageError: there is no such preset, or the model is not guided at all.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", hint=did_you_mean(preset, PRESETS))
    check_guidance(pipe, scale)
    settings = PRESETS[preset]
    warmup = round(settings["warmup"] * num_steps / PAPER_STEPS)
    positive = encode_prompts(pipe, captions)
    unsafe, empty = (encode_prompts(pipe, [text]).repeat(len(captions)) for text in (concept, ""))
    return Safe(positive=positive, unsafe=unsafe, empty=empty, scale=scale, **(settings | {"warmup": warmup}))
