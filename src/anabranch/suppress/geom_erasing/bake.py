# SPDX-License-Identifier: Apache-2.0
"""Bake: distil what the negative prompt does into a LoRA, for models and tools that take no negative prompt.

Paper     : the objective of Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345) with learned words.
Equation  : min || f_LoRA(z_t, c(y)) - sg[ f(z_t, c(y)) - eta (f(z_t, c(y_neg)) - f(z_t, c(""))) ] ||^2
            + keep || f_LoRA(z_t, c("")) - sg[ f(z_t, c("")) ] ||^2
Shapes    : B rows; f the denoiser with the adapter, its output (B, c, h, w); z_t from pictures of the model itself.
Differs   : not of the paper. The second term holds the unconditional output, so that guidance goes on to mean what it
            did. With eta = (s - 1) / s guidance s from the empty prompt equals guidance s from the negative one.
Check     : the target written out; a baked model needs no negative (tests/suppress/geom_erasing/test_bake.py).
Exempt    : off (a LoRA is there or not: suppress/lora)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.models.diffusion.conditioning import Conditioning, concatenate
from anabranch.models.diffusion.family import family, networks
from anabranch.models.diffusion.noising import noising
from anabranch.suppress.denoising import Trained, draw


class Baking(Trained):
    """Objective: batch of latents, noise, u and the number of each row's prompt -> {"loss": ()}.

    teacher  the pipeline with its adapter; never trained.
    """

    def __init__(
        self,
        pipe: Any,
        teacher: Any,
        parameters: Mapping[str, nn.Parameter],
        positive: Conditioning,
        negative: Conditioning,
        empty: Conditioning,
        *,
        eta: float,
        keep_coef: float,
    ):
        super().__init__(pipe, parameters)
        self.teacher = (teacher,)
        self.positive, self.negative, self.empty = positive, negative, empty
        self.eta, self.keep_coef = eta, keep_coef
        self.noising = noising(pipe.scheduler)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Baking":
        for network in networks(self.teacher[0]).values():
            network._apply(fn)
        self.positive, self.negative, self.empty = (part.map(fn) for part in (self.positive, self.negative, self.empty))
        super()._apply(fn, recurse)
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noised = self.noising.noise(batch["latents"], batch["noise"], batch["u"])
        rows = batch["prompt"]
        prompts = [self.positive.take(rows), self.negative.take(rows), self.empty.repeat(len(rows))]
        predict = family(self.pipe).predict
        with torch.no_grad():
            three = predict(self.teacher[0], noised.latents.repeat(3, 1, 1, 1), *self.inputs(noised.timestep, prompts))
            positive, negative, empty = three.chunk(3)
            target = positive - self.eta * (negative - empty)
        student = [prompts[0], prompts[2]]
        two = predict(self.pipe, noised.latents.repeat(2, 1, 1, 1), *self.inputs(noised.timestep, student))
        baked, unconditional = two.chunk(2)
        away = nn.functional.mse_loss(baked.float(), target.float())
        keep = nn.functional.mse_loss(unconditional.float(), empty.float())
        return {"loss": away + self.keep_coef * keep, "away": away, "keep": keep}

    @staticmethod
    def inputs(timestep: Tensor, prompts: list[Conditioning]) -> tuple[Tensor, Conditioning]:
        return timestep.repeat(len(prompts)), concatenate(prompts)


class BakingBatches:
    """Stream of `Baking`: latents that the model made, each with the number of the prompt it was made for."""

    def __init__(self, latents: Tensor, prompt_numbers: Tensor, batch_size: int, seed: int):
        self.latents, self.prompt_numbers, self.seed = latents.cpu().float(), prompt_numbers, seed
        self.indices = ShuffledIndices(len(latents), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        generator = torch.Generator().manual_seed(derived_seed("baking", self.seed, step))
        latents = self.latents[rows]
        return {
            "latents": latents,
            "prompt": self.prompt_numbers[rows],
            **draw(len(rows), tuple(latents.shape[1:]), generator),
        }
