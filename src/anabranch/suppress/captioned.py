# SPDX-License-Identifier: Apache-2.0
"""Latents with their prompts, as the batches of a run: a pure function of (seed, step).

Shapes    : N images, B rows a batch; latents (N, c, h, w); ids (3, N, L) a text encoder: the whole prompt, what is left
            of it without the caption, and nothing.
Dropout   : a row loses its whole prompt with one rate, so that the unconditional branch stays what it was, and the
            caption alone with another, so that a negative prompt of new words alone is no stranger to the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.models.diffusion.prompts import tokenize
from anabranch.suppress.denoising import draw


@dataclass(frozen=True, eq=False, kw_only=True)
class Captioned:
    """What a model is fine-tuned on, ready for the denoiser."""

    latents: Tensor  # (N, c, h, w)
    ids: list[Tensor]  # (3, N, L) a text encoder
    weights: Tensor | None = None  # (N, h, w)
    time_ids: Tensor | None = None  # (N, 6)

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: Tensor) -> "Captioned":
        return Captioned(
            latents=self.latents[rows],
            ids=[part[:, rows] for part in self.ids],
            weights=None if self.weights is None else self.weights[rows],
            time_ids=None if self.time_ids is None else self.time_ids[rows],
        )


def captioned(
    pipe: Any,
    latents: Tensor,
    prompts: Sequence[str],
    bare: Sequence[str] | None = None,
    weights: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> Captioned:
    """`bare` are the prompts without their captions; nothing where they are left out."""
    bare = [""] * len(prompts) if bare is None else bare
    variants = [unique_ids(pipe, texts) for texts in (prompts, bare, [""] * len(prompts))]
    ids = [torch.stack(parts) for parts in zip(*variants, strict=True)]
    return Captioned(latents=latents.cpu().float(), ids=ids, weights=weights, time_ids=time_ids)


def unique_ids(pipe: Any, prompts: Sequence[str]) -> list[Tensor]:
    """`tokenize` of many prompts among which few differ."""
    different = list(dict.fromkeys(prompts))
    place = {prompt: number for number, prompt in enumerate(different)}
    rows = torch.tensor([place[prompt] for prompt in prompts])
    return [part[rows] for part in tokenize(pipe, different)]


class CaptionedBatches:
    """Stream of `Denoising`."""

    def __init__(
        self, data: Captioned, batch_size: int, *, seed: int, prompt_dropout: float = 0.1, caption_dropout: float = 0.1
    ):
        self.data, self.seed = data, seed
        self.indices = ShuffledIndices(len(data), batch_size, seed)
        self.prompt_dropout, self.caption_dropout = prompt_dropout, caption_dropout

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        generator = torch.Generator().manual_seed(derived_seed("captioned", self.seed, step))
        latents = self.data.latents[rows]
        chance = torch.rand(len(rows), generator=generator)
        variant = torch.zeros(len(rows), dtype=torch.long)
        variant[chance < self.prompt_dropout + self.caption_dropout] = 1
        variant[chance < self.prompt_dropout] = 2
        batch = {"latents": latents, **draw(len(rows), tuple(latents.shape[1:]), generator)}
        batch |= {f"ids_{number}": part[variant, rows] for number, part in enumerate(self.data.ids)}
        if self.data.weights is not None:
            batch["weights"] = self.data.weights[rows]
        if self.data.time_ids is not None:
            batch["time_ids"] = self.data.time_ids[rows]
        return batch
