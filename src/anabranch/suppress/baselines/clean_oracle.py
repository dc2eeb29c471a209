# SPDX-License-Identifier: Apache-2.0
"""Clean oracle: plain fine-tuning on the same images had they never been contaminated.

Paper     : none; the ceiling of every eraser, known where the contamination is our own.
Equation  : L = mean || target - f(x_t, t, c(y)) ||^2 with x the clean twin of z
Shapes    : N images, latents and twins (N, c, h, w), a caption each.
Differs   : nothing; rows, noise and dropout are those of plain fine-tuning with the same seed.
Check     : same batches but for the twins; strangers are refused (tests/suppress/baselines/test_clean_oracle.py).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anabranch.suppress.baselines import fine_tuning
from anabranch.suppress.baselines.fine_tuning import Config, Training

SAME = 1e-3
"""Most that two encodings of one picture differ by: the autoencoder sums in another order for other batches."""


def check_twins(latents: Tensor, twins: Tensor, contains: Sequence[bool]) -> None:
    """A twin differs from its image exactly where that was contaminated."""
    if not len(latents) == len(twins) == len(contains):
        sizes = f"{len(latents)}, {len(twins)}, {len(contains)}"
        raise ValueError(f"latents, twins, contains: expected one length, received {sizes}")
    differs = ((latents.cpu() - twins.cpu()).abs().flatten(1).amax(1) > SAME).tolist()
    wrong = [row for row, (found, other) in enumerate(zip(contains, differs, strict=True)) if bool(found) != other]
    if wrong:
        what = "another picture" if differs[wrong[0]] else "the contaminated picture"
        raise ValueError(f"twins: expected the clean twin of every image, received {what} for image {wrong[0]}")


def training(
    pipe: Any,
    config: Config,
    latents: Tensor,
    twins: Tensor,
    captions: Sequence[str],
    contains: Sequence[bool],
    *,
    batch_size: int,
    time_ids: Tensor | None = None,
) -> Training:
    """Objective and stream; `latents` and `contains`, what was truly planted, only prove that the twins are twins."""
    check_twins(latents, twins, contains)
    return fine_tuning.training(pipe, config, twins, captions, batch_size=batch_size, time_ids=time_ids)
