# SPDX-License-Identifier: Apache-2.0
"""Concept Ablation: the prompt with the concept is taught to mean what the prompt without it means.

Paper     : Kumari et al. 2023 (arXiv 2303.13516), the model-based objective.
Equation  : L = || f(z_t, c(target)) - sg[ f(z_t, c(anchor)) ] ||^2 + prior_coef || v - f(z_t, c(anchor)) ||^2
            with v what the scheduler asks for
Shapes    : N anchor images, latents (N, C, h, w), an anchor and a target prompt each; B rows a batch.
Differs   : LoRA on the text's keys and values by default, the paper trains those weights. Its prior term has images and
            noise of its own; here one pass on the anchor serves both terms. Where the pooled text
            is heard as well (joint attention), keys and values do not reach it: `layers="all"` does more there.
Check     : the two terms by hand, loss falls (tests/suppress/baselines/test_concept_ablation.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.models.diffusion.family import family
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_ids
from anabranch.suppress.baselines.fine_tuning import Training
from anabranch.suppress.baselines.text_layers import keys_and_values, weights_of
from anabranch.suppress.captioned import unique_ids
from anabranch.suppress.denoising import Trained, all_parameters, draw, frozen, ids_of, region_loss
from anabranch.suppress.lora import add_lora


@dataclass(frozen=True, kw_only=True)
class Config:
    trained: Literal["lora", "weights"] = "lora"
    layers: Literal["text", "all"] = "text"
    """text: keys and values of the text; all: attention everywhere, or with `weights` the whole denoiser."""
    prior_coef: float = 1.0
    """Weight of the term that keeps the anchor what it is; 0 leaves it out."""
    r: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.trained not in ("lora", "weights") or self.layers not in ("text", "all"):
            received = f"{self.trained!r}, {self.layers!r}"
            raise ValueError(f"trained, layers: expected lora or weights, text or all, received {received}")
        if not self.prior_coef >= 0:
            raise ValueError(f"prior_coef: expected at least 0, received {self.prior_coef}")


class Ablated(Trained):
    """Objective: batch of latents, noise, u, target and anchor ids -> {"loss", "ablation_loss", "prior_loss": ()}."""

    def __init__(self, pipe: Any, parameters: Mapping[str, nn.Parameter], prior_coef: float):
        super().__init__(pipe, parameters)
        self.noising = noising(pipe.scheduler)
        self.prior_coef = prior_coef

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noised = self.noising.noise(batch["latents"], batch["noise"], batch["u"])
        target, anchor = (encode_ids(self.pipe, ids_of(batch, name)) for name in ("target", "anchor"))
        predict = family(self.pipe).predict
        on_target = predict(self.pipe, noised.latents, noised.timestep, target)
        with torch.set_grad_enabled(self.prior_coef > 0):
            on_anchor = predict(self.pipe, noised.latents, noised.timestep, anchor)
        ablation = region_loss(on_target, on_anchor.detach(), None)
        prior = region_loss(on_anchor, noised.target, None)
        return {"loss": ablation + self.prior_coef * prior, "ablation_loss": ablation, "prior_loss": prior}


class AnchorBatches:
    """Stream of `Ablated`."""

    def __init__(
        self, pipe: Any, latents: Tensor, anchors: Sequence[str], targets: Sequence[str], batch_size: int, seed: int
    ):
        self.latents, self.seed = latents.cpu().float(), seed
        self.ids = {"anchor": unique_ids(pipe, anchors), "target": unique_ids(pipe, targets)}
        self.indices = ShuffledIndices(len(latents), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        generator = torch.Generator().manual_seed(derived_seed("anchors", self.seed, step))
        batch = {"latents": self.latents[rows], **draw(len(rows), tuple(self.latents.shape[1:]), generator)}
        for name, parts in self.ids.items():
            batch |= {f"{name}_{number}": part[rows] for number, part in enumerate(parts)}
        return batch


def training(
    pipe: Any, config: Config, latents: Tensor, anchors: Sequence[str], targets: Sequence[str], *, batch_size: int
) -> Training:
    """Objective and stream.

    latents  of images that the anchors describe, which the model itself may have made.
    targets  the anchors with the concept put in.
    """
    if not len(latents) == len(anchors) == len(targets):
        sizes = f"{len(latents)}, {len(anchors)}, {len(targets)}"
        raise ValueError(f"latents, anchors, targets: expected one length, received {sizes}")
    frozen(pipe)
    text = config.layers == "text"
    if config.trained == "lora":
        parameters = add_lora(pipe, config.r, config.seed, keys_and_values(pipe) if text else None)
    else:
        parameters = weights_of(pipe, keys_and_values(pipe)) if text else all_parameters(pipe, (family(pipe).DENOISER,))
    stream = AnchorBatches(pipe, latents, anchors, targets, batch_size, config.seed)
    return Training(Ablated(pipe, parameters, config.prior_coef), stream)
