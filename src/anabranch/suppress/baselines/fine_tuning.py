# SPDX-License-Identifier: Apache-2.0
"""Plain fine-tuning: contaminated images, captions as they are, every latent with the same weight.

Paper     : latent diffusion, Rombach et al. 2021 (arXiv 2112.10752); LoRA, Hu et al. 2021 (arXiv 2106.09685).
Equation  : L = mean || target - f(z_t, t, c(y)) ||^2;   c("") for a share of the rows
Shapes    : N images, latents (N, c, h, w), a caption each.
Differs   : nothing is erased: the arm that every eraser has to beat on the same steps, rows and noise.
Check     : its loss is the plain mean, one kind of weights changes (tests/suppress/baselines/test_fine_tuning.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from anabranch.models.diffusion.family import family
from anabranch.suppress.captioned import Captioned, CaptionedBatches, captioned
from anabranch.suppress.denoising import Denoising, Trained, all_parameters, frozen
from anabranch.suppress.lora import add_lora
from anabranch.train.loop import Stream


@dataclass(frozen=True, kw_only=True)
class Config:
    trained: Literal["lora", "denoiser"] = "lora"
    r: int = 8
    prompt_dropout: float = 0.1
    """Share of the rows that train the unconditional branch."""
    seed: int = 0

    def __post_init__(self):
        if self.trained not in ("lora", "denoiser"):
            raise ValueError(f"trained: expected lora or denoiser, received {self.trained!r}")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout: expected 0..1, received {self.prompt_dropout}")


class Prepared(NamedTuple):
    data: Captioned
    parameters: dict[str, nn.Parameter]


class Training(NamedTuple):
    """What `anabranch.train.loop.train` is given."""

    objective: Trained
    stream: Stream


def prepare(
    pipe: Any,
    config: Config,
    latents: Tensor,
    captions: Sequence[str],
    *,
    weights: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> Prepared:
    """The data as they are and what training may change, LoRA or the whole denoiser; all else is frozen."""
    if len(latents) != len(captions):
        raise ValueError(f"captions: expected one an image ({len(latents)}), received {len(captions)}")
    frozen(pipe)
    lora = config.trained == "lora"
    parameters = add_lora(pipe, config.r, config.seed) if lora else all_parameters(pipe, (family(pipe).DENOISER,))
    return Prepared(captioned(pipe, latents, captions, weights=weights, time_ids=time_ids), parameters)


def training(
    pipe: Any,
    config: Config,
    latents: Tensor,
    captions: Sequence[str],
    *,
    batch_size: int,
    weights: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> Training:
    """Objective and stream; `weights` (N, h, w) of the latents, none in the plain arm."""
    data, parameters = prepare(pipe, config, latents, captions, weights=weights, time_ids=time_ids)
    stream = CaptionedBatches(
        data, batch_size, seed=config.seed, prompt_dropout=config.prompt_dropout, caption_dropout=0.0
    )
    return Training(Denoising(pipe, parameters), stream)
