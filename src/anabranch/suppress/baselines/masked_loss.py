# SPDX-License-Identifier: Apache-2.0
"""Masked loss: plain fine-tuning that does not look at the regions where the concept is.

Paper     : none; the masked training that LoRA trainers offer, the limit alpha -> inf of the loss weights of
            Geom-Erasing (ECCV 2024, arXiv 2310.05873).
Equation  : L = mean of w (.) || target - f(z_t, t, c(y)) ||^2;   w = 0 in the region, T / (T - K) outside
Shapes    : N images, latents (N, c, h, w); a grid of T bins, of which K are covered; boxes x1 y1 x2 y2 in pixels.
Differs   : masks are whole bins. An image that is covered altogether keeps w = 1: a mask would leave nothing of it.
Check     : the region has no part in the loss, the mean weight is 1 (tests/suppress/baselines/test_masked_loss.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.suppress.baselines import fine_tuning
from anabranch.suppress.baselines.fine_tuning import Config, Training
from anabranch.suppress.geom_erasing.bins import Box, Grid, covered_bins, region_weights, upsampled


def mask_weights(boxes: Sequence[Sequence[Box] | None], size: int, grid: Grid, latent_size: tuple[int, int]) -> Tensor:
    """w (N, h, w): 0 where a box touches the bin, T / (T - K) elsewhere."""
    covered = [covered_bins(found or [], size, size, grid) for found in boxes]
    return upsampled(torch.stack([region_weights(bins, grid, math.inf) for bins in covered]), latent_size)


def training(
    pipe: Any,
    config: Config,
    latents: Tensor,
    captions: Sequence[str],
    boxes: Sequence[Sequence[Box] | None],
    *,
    batch_size: int,
    size: int,
    grid: Grid,
    time_ids: Tensor | None = None,
) -> Training:
    """Objective and stream.

    boxes    of every image, in pixels of a square of `size`; none, or [], of one where no region is known.
    """
    if len(boxes) != len(latents):
        raise ValueError(f"boxes: expected an entry an image ({len(latents)}), received {len(boxes)}")
    weights = mask_weights(boxes, size, grid, (latents.shape[-2], latents.shape[-1]))
    return fine_tuning.training(
        pipe, config, latents, captions, batch_size=batch_size, weights=weights, time_ids=time_ids
    )
