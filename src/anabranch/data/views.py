# SPDX-License-Identifier: Apache-2.0
"""Two views of every image of a batch, so that a network can learn what stays the same: drawn first, applied after.

Paper     : the recipe of Chen et al. 2020, "A Simple Framework for Contrastive Learning" (arXiv 2002.05709), cut down
            to what small grey images keep their meaning under; small crops of Caron et al. 2020 (arXiv 2006.09882).
Equation  : y = clamp(c b x' + (1 - c) b mean(x') + 255 n),  x' a turned crop of x,
            b ~ U(1 - brightness, 1 + brightness),  c ~ U(1 - contrast, 1 + contrast),  n ~ N(0, noise_std^2) a value.
Shapes    : V views, B images, C channels, S pixels a side; uint8 in, uint8 out.
Differs   : no blur, no loss of colour, and no flip unless asked for: mirrored letters are other letters. A crop that is
            turned over the border sees the border's pixels repeated. Small crops keep the full pixel size.
Check     : identity settings give the image back exactly; drawn values stay in range (tests/data/test_views.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.data.augment import apply_crops, draw_crops

NUM_LARGE = 2


@dataclass(frozen=True, kw_only=True)
class Views:
    scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a view shows."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    degrees: float = 10.0
    brightness: float = 0.4
    contrast: float = 0.4
    noise_std: float = 0.05
    """Of the full range from black to white."""
    flip: float = 0.0
    """Probability of a mirrored view."""
    num_small: int = 0
    """Further views that show less."""
    small_scale: tuple[float, float] = (0.1, 0.4)

    def __post_init__(self) -> None:
        for name in ("scale", "small_scale"):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1] <= 1:
                raise ValueError(f"{name}: expected 0 < least <= most <= 1, received {getattr(self, name)}")
        if not 0 < self.aspect[0] <= 1 <= self.aspect[1]:
            raise ValueError(f"aspect: expected 0 < least <= 1 <= most, received {self.aspect}")
        for name, most in (("brightness", 1), ("contrast", 1), ("flip", 1), ("degrees", 180), ("noise_std", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected 0..{most}, received {getattr(self, name)}")
        if self.num_small < 0:
            raise ValueError(f"num_small: expected at least 0, received {self.num_small}")


class Draw(NamedTuple):
    """What is random in the views of one batch."""

    crops: Tensor  # (V, B, 2, 3) affine maps from the view to the image, both with corners at -1 and 1
    brightness: Tensor  # (V, B)
    contrast: Tensor  # (V, B)
    noise_seed: Tensor  # (V,) int64: the noise itself is as large as the views
    noise_std: float


def draw_views(num_images: int, generator: torch.Generator, config: Views) -> Draw:
    """Two large views of each image, then the small ones: more small ones leave the earlier as they are."""
    scales = [config.scale] * NUM_LARGE + [config.small_scale] * config.num_small
    crops, brightness, contrast, seeds = [], [], [], []
    for scale in scales:
        crops_B23 = draw_crops(num_images, generator, scale, config.aspect, config.flip)
        signed_3B = 2 * torch.rand(3, num_images, generator=generator) - 1
        crops.append(turned(crops_B23, config.degrees * signed_3B[0]))
        brightness.append(1 + config.brightness * signed_3B[1])
        contrast.append(1 + config.contrast * signed_3B[2])
        seeds.append(torch.randint(2**62, (), generator=generator))
    parts = (torch.stack(part) for part in (crops, brightness, contrast, seeds))
    return Draw(*parts, noise_std=config.noise_std)


def turned(crops: Tensor, degrees: Tensor) -> Tensor:
    """(B, 2, 3) crops, each turned about its own centre."""
    angle_B = degrees.deg2rad()
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    rotation_B22 = torch.stack([torch.stack([cos_B, -sin_B], 1), torch.stack([sin_B, cos_B], 1)], 1)
    return torch.cat([rotation_B22 @ crops[:, :, :2], crops[:, :, 2:]], 2)


def apply_views(images: Tensor, draw: Draw) -> Tensor:
    """(B, C, S, S) -> (V, B, C, S, S), both uint8."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: expected uint8 (B, C, S, S), received {images.dtype} {tuple(images.shape)}")
    if len(images) != draw.crops.shape[1]:
        raise ValueError(f"images: expected {draw.crops.shape[1]} as drawn, received {len(images)}")
    pixels = images.float()
    views = []
    for crops, brightness, contrast, seed in zip(*draw[:4], strict=True):
        view = shaded(apply_crops(pixels, crops), brightness, contrast)
        if draw.noise_std:
            generator = torch.Generator().manual_seed(int(seed))
            view += torch.randn(view.shape, generator=generator).mul_(255 * draw.noise_std)
        views.append(view.round_().clamp_(0, 255).to(torch.uint8))
    return torch.stack(views)


def shaded(pixels: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """c b x + (1 - c) b mean(x), the mean over the pixels and channels of each image."""
    mean_B = pixels.mean((1, 2, 3))
    scale_B, shift_B = contrast * brightness, (1 - contrast) * brightness * mean_B
    return pixels * scale_B[:, None, None, None] + shift_B[:, None, None, None]


def make_views(images: Tensor, generator: torch.Generator, config: Views) -> Tensor:
    """Draw and apply: (B, C, S, S) -> (2 + num_small, B, C, S, S), both uint8."""
    return apply_views(images, draw_views(len(images), generator, config))
