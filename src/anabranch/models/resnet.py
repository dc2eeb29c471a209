# SPDX-License-Identifier: Apache-2.0
"""Bridge to the residual network of transformers: build, load, take features, hand back a stock ResNetModel.

Paper     : He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
Equation  : x_{l+1} = relu(x_l + F_l(x_l));  f(x) = mean over pixels of the last stage's map.
Shapes    : B images, C channels, S pixels a side, D channels of the last stage.
Differs   : nothing; a model is the stock class. Its stem divides by 4 and the whole by 32, so that an image of 28
            pixels leaves maps of 7, 7, 4, 2 and 1 pixels a side; reading small images at 56 doubles these.
            `config.image_size` is ours: the stock configuration has none, and the network takes every size.
Check     : `features` equals the pooled output of AutoModel bit for bit, `macs` a count by hand
            (tests/models/test_resnet.py).
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.bridge import check_fit, load_stock, transformers
from anabranch.models.vit_mae import copy_of, image_processor, normalise

__all__ = [
    "PRESETS",
    "Preset",
    "build",
    "check_images",
    "check_size",
    "copy_of",
    "feature_size",
    "features",
    "image_processor",
    "load",
    "macs",
    "normalise",
    "to_plain",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The size of a residual network; its image size is free."""

    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    layer_type: Literal["basic", "bottleneck"]


PRESETS = {
    "tiny": Preset(embedding_size=24, hidden_sizes=(24, 48, 96, 128), depths=(1, 1, 1, 1), layer_type="basic"),
    "narrow": Preset(embedding_size=12, hidden_sizes=(12, 24, 48, 64), depths=(1, 1, 1, 1), layer_type="basic"),
    "small": Preset(embedding_size=64, hidden_sizes=(64, 128, 256, 512), depths=(2, 2, 2, 2), layer_type="basic"),
    "base": Preset(
        embedding_size=64, hidden_sizes=(256, 512, 1024, 2048), depths=(3, 4, 6, 3), layer_type="bottleneck"
    ),
}
FEATURES = "mean over pixels of the last stage"
LEAST_SIZE = 17
"""Half the network's stride of 32, and one: from 16 pixels down the last two stages look at a single pixel."""


def check_size(preset: str, image_size: int) -> None:
    """Is there such a preset, and does an image of this size reach its last stage?"""
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", hint=did_you_mean(preset, PRESETS))
    if image_size < LEAST_SIZE:
        raise UsageError(
            f"preset {preset} divides the sides of an image by 32; {image_size} pixels are too few",
            expected=f"at least {LEAST_SIZE} pixels a side",
            received=image_size,
            hint="--image-size 56: small images are enlarged when they are read",
        )


def build(preset: str, *, image_size: int, channels: int, seed: int) -> nn.Module:
    """A fresh ResNetModel, its initial weights a function of `seed` alone."""
    check_size(preset, image_size)
    config = transformers().ResNetConfig(num_channels=channels, **asdict(PRESETS[preset]))
    config.image_size = image_size
    return fresh(config, seed)


def fresh(config: Any, seed: int) -> nn.Module:
    """A new model of this configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers().ResNetModel(config).eval()


def load(path: str | Path) -> nn.Module:
    """A residual network from a local transformers folder; a classifier's head is left behind.

    Raises:
        UsageError: the folder is missing, holds another kind of model, or lacks tensors of its own configuration.
    """
    return load_stock(
        path,
        "ResNetModel",
        model_type="resnet",
        expected="a residual network",
        hint="give a ResNet checkpoint, or leave --base out to train one",
    )


def check_images(model: nn.Module, *, image_size: int, channels: int, name: str) -> None:
    """Images of another size would pass through, but the model would be used otherwise than it was trained."""
    size = getattr(model.config, "image_size", None) or image_size
    check_fit(name, image_size, channels, size, model.config.num_channels)


def feature_size(model: nn.Module) -> int:
    """D, the width of `features`."""
    return int(model.config.hidden_sizes[-1])


def features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Mean over pixels of the last stage: (B, C, S, S) -> (B, D)."""
    return model(pixel_values).pooler_output.flatten(1)


@torch.no_grad()
def macs(model: nn.Module, image_size: int | None = None) -> int:
    """Multiply-accumulates of one image through all convolutions, counted on one forward."""
    image_size = image_size or getattr(model.config, "image_size", None)
    if image_size is None:
        raise UsageError("the model's configuration names no image size", expected="image_size, in pixels a side")
    counts: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    # on a copy without data: nothing is computed, and neither mode nor statistics of the model are disturbed
    shadow = copy.deepcopy(model).to("meta").eval()
    for layer in shadow.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    shadow(torch.zeros(1, model.config.num_channels, image_size, image_size, device="meta"))
    return sum(counts)


def to_plain(model: nn.Module) -> nn.Module:
    """An independent stock ResNetModel with these weights, for save_pretrained."""
    plain = fresh(copy.deepcopy(model.config), seed=0)
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain
