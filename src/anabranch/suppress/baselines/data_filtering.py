# SPDX-License-Identifier: Apache-2.0
"""Data filtering: plain fine-tuning on the images that the detector calls clean.

Paper     : none; what dataset builders do, for instance LAION-5B, Schuhmann et al. 2022 (arXiv 2210.08402).
Equation  : L = mean over { i : d_i = 0 } of || target - f(z_t, t, c(y_i)) ||^2
Shapes    : N images, latents (N, c, h, w), a caption and a verdict d each.
Differs   : nothing; images that the detector misses stay, as they would.
Check     : found images are never drawn; too few left are refused (tests/suppress/baselines/test_data_filtering.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.suppress.baselines import fine_tuning
from anabranch.suppress.baselines.fine_tuning import Config, Training


def clean_rows(contains: Sequence[bool], minimum: int) -> Tensor:
    """Numbers of the images that are left.

    Raises:
        UsageError: fewer than `minimum`.
    """
    rows = torch.tensor([row for row, found in enumerate(contains) if not found], dtype=torch.long)
    if len(rows) < minimum:
        raise UsageError(
            "filtering leaves too few images to train on",
            expected=f"at least {minimum} without the concept",
            received=f"{len(rows)} of {len(contains)}",
            hint="a higher threshold of the detector, or a method that also learns from images with the concept",
        )
    return rows


def training(
    pipe: Any,
    config: Config,
    latents: Tensor,
    captions: Sequence[str],
    contains: Sequence[bool],
    *,
    batch_size: int,
    minimum: int = 100,
    time_ids: Tensor | None = None,
) -> Training:
    """Objective and stream of what is left; `contains` is the detector's verdict on every image."""
    if len(contains) != len(latents):
        raise ValueError(f"contains: expected a verdict an image ({len(latents)}), received {len(contains)}")
    rows = clean_rows(contains, max(1, minimum))
    kept = [captions[row] for row in rows.tolist()]
    time_ids = None if time_ids is None else time_ids[rows]
    return fine_tuning.training(pipe, config, latents[rows], kept, batch_size=batch_size, time_ids=time_ids)
