# SPDX-License-Identifier: Apache-2.0
"""How a scheduler noises latents, and what the denoiser is to predict: read from its configuration, never assumed.

Equation  : diffusion       z_t = sqrt(a_t) z + sqrt(1 - a_t) eps;  target eps, z, or sqrt(a_t) eps - sqrt(1 - a_t) z
            flow matching   z_t = (1 - s) z + s eps;                target eps - z
Shapes    : B latents (B, C, h, w); a position u in [0, 1) a row chooses the timestep.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.errors import UsageError


class Noised(NamedTuple):
    latents: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)
    target: Tensor  # (B, C, h, w)


@dataclass(frozen=True)
class Flow:
    """Straight paths from data to noise; `shift` moves the positions towards noise, as the scheduler's does."""

    num_train_timesteps: int
    shift: float = 1.0

    def noise(self, latents: Tensor, eps: Tensor, u: Tensor) -> Noised:
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        s = sigma.view(-1, 1, 1, 1)
        return Noised((1 - s) * latents + s * eps, sigma * self.num_train_timesteps, eps - latents)


@dataclass(frozen=True)
class Diffusion:
    alphas_cumprod: Tensor  # (steps,)
    prediction_type: str

    def noise(self, latents: Tensor, eps: Tensor, u: Tensor) -> Noised:
        timestep = (u * len(self.alphas_cumprod)).long()
        a = self.alphas_cumprod.to(latents.device)[timestep].view(-1, 1, 1, 1)
        targets = {"epsilon": eps, "sample": latents, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * latents}
        return Noised(a.sqrt() * latents + (1 - a).sqrt() * eps, timestep, targets[self.prediction_type])


def noising(scheduler: Any) -> Flow | Diffusion:
    """The process that this scheduler undoes."""
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__:
        return Flow(config.num_train_timesteps, float(config.get("shift") or 1.0))
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "sample", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(
            f"{type(scheduler).__name__} with prediction_type={prediction!r} cannot be trained for",
            expected="flow matching, or alphas with epsilon, sample or v_prediction",
            hint="the scheduler that the checkpoint was trained with",
        )
    return Diffusion(torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32), prediction)
