# SPDX-License-Identifier: Apache-2.0
"""Erased Stable Diffusion: train the word's prediction to point away from the word.

Paper     : Gandikota et al. 2023 (arXiv 2303.07345): the objective, variants ESD-x and ESD-u.
Equation  : L = || eps(z_t, c(word)) - [ eps_0(z_t, c("")) - eta (eps_0(z_t, c(word)) - eps_0(z_t, c(""))) ] ||^2
            z_t from the model's own sampling of the word, stopped at a step drawn for every row
Shapes    : B rows; noise (B, C, h, w); stop (B,) steps of the sampler, 0 .. num_steps - 1.
Differs   : LoRA by default; the frozen eps_0 is the same network without it, or with its first weights put back. In
            joint attention x are the keys and values of the text, which the pooled text passes by. It serves velocities
            too: the target's factors sum to one. The authors' later code starts at c(word): its eta is ours plus one.
Check     : the target by hand, loss falls, only named weights change (tests/suppress/baselines/test_esd.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.family import denoiser, family
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.fine_tuning import Training
from anabranch.suppress.baselines.own_samples import Noisy, OwnSamples, partly_sampled
from anabranch.suppress.baselines.text_layers import cross_attention, other_attention, weights_of
from anabranch.suppress.denoising import Trained, frozen, region_loss
from anabranch.suppress.guidance import Negative
from anabranch.suppress.lora import add_lora


@dataclass(frozen=True, kw_only=True)
class Config:
    variant: Literal["x", "u"] = "x"
    """x: where the image attends to the text; u: the rest, for concepts that a prompt need not name."""
    trained: Literal["lora", "weights"] = "lora"
    eta: float = 1.0
    guidance: float = 3.0
    """Of the sampling that makes z_t."""
    num_steps: int = 50
    r: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.variant not in ("x", "u") or self.trained not in ("lora", "weights"):
            received = f"{self.variant!r}, {self.trained!r}"
            raise ValueError(f"variant, trained: expected x or u, lora or weights, received {received}")
        if not self.eta > 0 or self.num_steps < 1:
            raise ValueError(f"eta, num_steps: expected above 0, received {self.eta}, {self.num_steps}")


def erased_target(empty: Tensor, word: Tensor, eta: float) -> Tensor:
    """eps("") - eta (eps(word) - eps(""))"""
    return empty - eta * (word - empty)


class ErasedPrediction(Trained):
    """Objective: batch of noise and stop -> {"loss": ()}."""

    def __init__(self, pipe: Any, parameters: Mapping[str, nn.Parameter], word: str, config: Config):
        super().__init__(pipe, parameters)
        self.word, self.config = word, config
        keep = config.trained == "weights"
        self.first = {name: p.detach().clone() for name, p in self.named_parameters()} if keep else {}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noise, rows = batch["noise"], len(batch["noise"])
        word, empty = (encode_prompts(self.pipe, [text]).repeat(rows) for text in (self.word, ""))
        rule = Negative(positive=word, negative=empty, scale=self.config.guidance)
        noisy = partly_sampled(self.pipe, rule, noise, batch["stop"], self.config.num_steps)
        with torch.no_grad(), self.teacher():
            target = erased_target(self.predict(noisy, empty), self.predict(noisy, word), self.config.eta)
        return {"loss": region_loss(self.predict(noisy, word), target, None)}

    def predict(self, noisy: Noisy, prompt: Conditioning) -> Tensor:
        output: Tensor = family(self.pipe).predict(self.pipe, noisy.latents, noisy.timestep, prompt)
        return output

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The network as it was: without LoRA, or with its first weights."""
        network = denoiser(self.pipe)
        lora = (network.disable_adapters, network.enable_adapters)
        leave, come_back = (self.exchange, self.exchange) if self.first else lora
        leave()
        torch.clear_autocast_cache()  # it keeps copies of the weights that just left
        try:
            yield
        finally:
            come_back()
            torch.clear_autocast_cache()

    def exchange(self) -> None:
        """Trained weights and first weights change places."""
        for name, parameter in self.named_parameters():
            parameter.data, self.first[name] = self.first[name].to(parameter), parameter.data


def training(pipe: Any, config: Config, word: str, *, batch_size: int) -> Training:
    """Objective and stream; no images are needed."""
    frozen(pipe)
    if config.trained == "lora":
        targets = cross_attention(pipe) if config.variant == "x" else other_attention(pipe)
        parameters = add_lora(pipe, config.r, config.seed, targets)
    else:
        parameters = weights_of(pipe, cross_attention(pipe), others=config.variant == "u")
    stream = OwnSamples(pipe, batch_size, config.num_steps, config.seed)
    return Training(ErasedPrediction(pipe, parameters, word, config), stream)
