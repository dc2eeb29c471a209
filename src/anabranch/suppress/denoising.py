# SPDX-License-Identifier: Apache-2.0
"""The loss that every method here trains with: predict what the scheduler asks for, weighted by region.

Equation  : L = mean over rows and latents of w (.) || target - f(z_t, t, c(y)) ||^2
Shapes    : B rows; latents and noise (B, C, h, w); weights (B, h, w); ids (B, L), one entry a text encoder.

The frozen pipeline is held, not owned: the state of the objective, hence every checkpoint, is what is trained alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.models.diffusion.family import family, networks
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_ids


class Trained(nn.Module):
    """Named parameters that live in the networks of a pipeline."""

    def __init__(self, pipe: Any, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self.held = (pipe,)  # a tuple is no sub-module
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    @property
    def pipe(self) -> Any:
        return self.held[0]

    def computing(self) -> list[nn.Module]:
        """In whose forward passes the parameters are used: what sharded training shards."""
        own = {id(parameter) for parameter in self.parameters()}
        return [n for n in networks(self.pipe).values() if any(id(p) in own for p in n.parameters())]

    def _apply(self, fn: Callable, recurse: bool = True) -> "Trained":
        for network in networks(self.pipe).values():
            network._apply(fn)
        for name, parameter in self.named_parameters():
            if parameter.device != fn(parameter.detach()[:0]).device:
                raise RuntimeError(f"{name}: not a parameter of the pipeline")
        return self

    def train(self, mode: bool = True) -> "Trained":
        """The networks stay in evaluation mode: fine-tuning under dropout would train another model."""
        self.training = mode
        return self


class Denoising(Trained):
    """Objective: batch of latents, noise, u, ids and maybe weights -> {"loss": ()}."""

    def __init__(self, pipe: Any, parameters: Mapping[str, nn.Parameter]):
        super().__init__(pipe, parameters)
        self.noising = noising(pipe.scheduler)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noised = self.noising.noise(batch["latents"], batch["noise"], batch["u"])
        conditioning = encode_ids(self.pipe, ids_of(batch), batch.get("time_ids"))
        output = family(self.pipe).predict(self.pipe, noised.latents, noised.timestep, conditioning)
        return {"loss": region_loss(output, noised.target, batch.get("weights"))}


def ids_of(batch: Mapping[str, Tensor], prefix: str = "ids") -> list[Tensor]:
    """The token ids of a batch, one tensor a text encoder."""
    return [batch[name] for name in sorted(batch) if name.startswith(f"{prefix}_")]


def region_loss(output: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """mean of w (.) || target - output ||^2; without weights the plain mean."""
    wide = torch.promote_types(output.dtype, torch.float32)
    output, target = output.to(wide), target.to(wide)
    if weights is None:
        return nn.functional.mse_loss(output, target)
    square = nn.functional.mse_loss(output, target, reduction="none")
    return (square * weights[:, None].to(wide)).mean()


def all_parameters(pipe: Any, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Every weight of the named networks, set to be trained."""
    found = {}
    for name in names:
        for key, parameter in networks(pipe)[name].requires_grad_(True).named_parameters():
            found[f"{name}.{key}"] = parameter
    return found


def frozen(pipe: Any) -> None:
    for network in networks(pipe).values():
        network.eval().requires_grad_(False)


def draw(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """The random part of a batch: noise (B, C, h, w) and a position u (B,) on the way to it."""
    return {
        "noise": torch.randn(rows, *shape, generator=generator),
        "u": torch.rand(rows, generator=generator),
    }
