# SPDX-License-Identifier: Apache-2.0
"""Pictures to latents and back, with the autoencoder's own scale and shift.

Shapes    : pictures (B, C, S, S) uint8 of 1 or 3 channels; latents (B, c, h, w) float.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 64


@torch.no_grad()
def to_latents(pipe: Any, pixels: Tensor) -> Tensor:
    """The mode of the autoencoder's posterior, scaled as the denoiser sees it; grey pictures are repeated if needed."""
    vae = pipe.vae
    parts = []
    for chunk in pixels.split(CHUNK):
        x = chunk.to(vae.device).to(vae.dtype) / 127.5 - 1
        x = x.expand(-1, vae.config.in_channels, -1, -1)
        encoded = vae.encode(x)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        parts.append((latents - shift(vae)) * vae.config.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def to_pixels(pipe: Any, latents: Tensor) -> Tensor:
    """(B, C, S, S) uint8, rounded as the stock pipeline's PIL images are."""
    vae = pipe.vae
    parts = []
    for chunk in latents.split(CHUNK):
        x = vae.decode(chunk / vae.config.scaling_factor + shift(vae), return_dict=False)[0]
        parts.append(((x / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def shift(vae: Any) -> float:
    return float(vae.config.get("shift_factor") or 0.0)
