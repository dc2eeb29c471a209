# SPDX-License-Identifier: Apache-2.0
"""Random resized crop and horizontal flip of a whole batch, drawn first and applied after.

Equation  : area a ~ U(scale) of the image, aspect r with log r ~ U(log max(3/4, a), log min(4/3, 1/a));
            width sqrt(a r), height sqrt(a / r), place uniform, mirrored with probability 1/2.
Shapes    : B images, C channels, H x W pixels.
Differs   : the usual recipe draws up to ten times until a crop fits and then takes the centre; here the aspect is drawn
            among those that fit, so that area and aspect hold for every crop. Sampling is bilinear.
Check     : identity crops give the image back exactly; drawn areas, aspects and places stay in range.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_crops(
    num_images: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Tensor:
    """(B, 2, 3) affine maps from the crop to the image, both with corners at -1 and 1."""
    uniform_5B = torch.rand(5, num_images, generator=generator)
    area_B = scale[0] + (scale[1] - scale[0]) * uniform_5B[0]
    least_B, most_B = area_B.clamp(min=aspect[0]).log(), (1 / area_B).clamp(max=aspect[1]).log()
    aspect_B = (least_B + (most_B - least_B) * uniform_5B[1]).exp()
    width_B, height_B = (area_B * aspect_B).sqrt().clamp(max=1), (area_B / aspect_B).sqrt().clamp(max=1)
    theta_B23 = torch.zeros(num_images, 2, 3)
    theta_B23[:, 0, 0] = torch.where(uniform_5B[4] < flip, -width_B, width_B)
    theta_B23[:, 1, 1] = height_B
    theta_B23[:, 0, 2] = (1 - width_B) * (2 * uniform_5B[2] - 1)
    theta_B23[:, 1, 2] = (1 - height_B) * (2 * uniform_5B[3] - 1)
    return theta_B23


def apply_crops(images: Tensor, crops: Tensor) -> Tensor:
    """(B, C, H, W) at the same size and dtype; uint8 is rounded."""
    grid_BHW2 = F.affine_grid(crops.to(images.device), list(images.shape), align_corners=False)
    out_BCHW = F.grid_sample(images.float(), grid_BHW2, padding_mode="border", align_corners=False)
    if images.dtype.is_floating_point:
        return out_BCHW.to(images.dtype)
    return out_BCHW.round().clamp(0, 255).to(images.dtype)


def random_resized_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) cropped, resized back and perhaps mirrored."""
    return apply_crops(images, draw_crops(len(images), generator))
