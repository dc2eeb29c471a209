# SPDX-License-Identifier: Apache-2.0
"""Relearning: fine-tune the erased model a little, on pictures of the concept or on harmless ones, and look again.

Paper     : arXiv 2406.13356 (a few pictures of what was erased), arXiv 2410.08074 (unrelated, benign pictures).
Equation  : W x + B A x, B zero at the start;  L = mean || target - f(z_t, t, c(y)) ||^2
Shapes    : k pictures, latents (k, c, h, w), a caption each; A (r, in), B (out, r) of every attention projection.
Differs   : the LoRA is added to the output of whatever layer is there, an adapted one as well, so that the adapter
            under attack is neither renamed, rescaled nor switched off.
Check     : nothing changes at step 0, the loss falls, the model is back bit for bit afterwards
            (tests/suppress/attacks/test_relearning.py).
Exempt    : dtype (its LoRA is float32, for pipelines in float32); samples (batches are drawn by the place of a picture)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import denoiser, family
from anabranch.suppress.captioned import CaptionedBatches, captioned
from anabranch.suppress.denoising import Denoising, frozen
from anabranch.train.loop import TrainConfig, train

T = TypeVar("T")
NAME = "relearned"


@dataclass(frozen=True, kw_only=True)
class Config:
    at: tuple[int, ...] = (0, 25, 50, 100)
    """Steps after which somebody looks; the last one ends the training."""
    r: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        if not self.at or list(self.at) != sorted({*self.at}) or self.at[0] < 0 or self.at[-1] < 1:
            raise ValueError(f"at: expected rising steps, the last above 0, received {self.at}")


def relearn(
    pipe: Any, latents: Tensor, captions: Sequence[str], config: Config, look: Callable[[int], T]
) -> list[tuple[int, T]]:
    """(step, look(step)) at every step in `config.at`; the pipeline is as before when it returns."""
    if not len(latents) or len(latents) != len(captions):
        raise ValueError(f"captions: expected one for each of {len(latents)} pictures, received {len(captions)}")
    seen: list[tuple[int, T]] = []

    def on_step(step: int, logs: Mapping[str, float]) -> None:
        if step in config.at:
            seen.append((step, look(step)))

    frozen(pipe)
    batch = min(config.batch_size, len(latents))
    data = captioned(pipe, latents, captions)
    stream = CaptionedBatches(data, batch, seed=config.seed, caption_dropout=0.0)
    plan = TrainConfig(
        steps=config.at[-1],
        batch_size=batch,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        seed=config.seed,
        deterministic=False,
    )
    with side_lora(pipe, config.r, config.seed) as parameters:
        on_step(0, {})
        train(Denoising(pipe, parameters), stream, plan, on_step=on_step)
    return seen


@contextmanager
def side_lora(pipe: Any, r: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """B A x beside every attention projection, for as long as the context lasts; yields the factors."""
    network = denoiser(pipe)
    targets = tuple(f".{target}" for target in family(pipe).TARGET_MODULES)
    found = {name: layer for name, layer in network.named_modules() if name.endswith(targets)}
    if not found:
        raise UsageError(
            "there is nothing to fine-tune in the model", expected=f"layers whose names end in {', '.join(targets)}"
        )
    generator = torch.Generator().manual_seed(derived_seed(NAME, seed))
    factors, handles = nn.ParameterDict(), []
    for name, layer in found.items():
        weight = getattr(layer, "base_layer", layer).weight
        first = torch.randn(r, weight.shape[1], generator=generator) / r
        pair = [nn.Parameter(part.to(weight.device)) for part in (first, torch.zeros(weight.shape[0], r))]
        key = name.replace(".", "/")
        factors[f"{key}/A"], factors[f"{key}/B"] = pair
        handles.append(layer.register_forward_hook(added(*pair)))
    network.add_module(NAME, factors)  # so that it moves with the network
    try:
        yield {f"{NAME}.{key}": parameter for key, parameter in factors.items()}
    finally:
        delattr(network, NAME)
        for handle in handles:
            handle.remove()


def added(A: nn.Parameter, B: nn.Parameter) -> Callable:
    """W x + B A x."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0].to(A.dtype) @ A.T @ B.T).to(output.dtype)

    return hook
