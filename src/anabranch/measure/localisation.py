# SPDX-License-Identifier: Apache-2.0
"""Does the word look at the concept? An attention map against the place where the detector saw it.

Paper     : Geom-Erasing (arXiv 2310.05873), cross-attention of the concept's word; the pointing game is of
            Zhang et al. 2016 (arXiv 1608.00507).
Equation  : AUROC of the map's pixels against the mask;  lift = (mass in mask / mass) / (pixels in mask / pixels);
            pointing game: the maximum lies in the mask.
Shapes    : maps (N, h, w), at least 0; masks (N, H, W) of bool; maps are brought to H x W bilinearly (pixel centres).
Differs   : all three are means over images, so that a large concept does not outweigh small ones. No tolerance around
            the mask; where the maximum is a plateau, half of it must lie inside: a map that points nowhere misses.
Check     : the mask itself gives 1, 1 / area, hit; a constant map .5, 1, miss (tests/measure/test_localisation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate

from anabranch.measure.concept_ratio import Rate, ratio
from anabranch.measure.intervals import Interval, interval


@dataclass(frozen=True)
class Localisation:
    """How well maps point at the concept; without knowledge of it AUROC is about .5 and lift about 1."""

    auroc: Interval
    lift: Interval
    pointing: Rate


def resize(maps: ArrayLike, height: int, width: int) -> np.ndarray:
    """Maps (N, h, w) at the size of the image (N, height, width), bilinear between pixel centres, in fp64."""
    maps_NHW = torch.from_numpy(np.asarray(maps, dtype=np.float64))
    if maps_NHW.ndim != 3:
        raise ValueError(f"maps: expected (images, height, width), received {tuple(maps_NHW.shape)}")
    resized = interpolate(maps_NHW[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return np.asarray(resized[:, 0].numpy())


def boxes_as_masks(boxes: Sequence[Sequence[Sequence[float]]], height: int, width: int) -> np.ndarray:
    """For each image its boxes (x1, y1, x2, y2) in pixels -> (N, height, width), true where a pixel's centre is in one.

    Raises:
        ValueError: a box that is empty (perhaps x, y, width, height), not finite, or reaches outside the image.
    """
    masks = np.zeros((len(boxes), height, width), dtype=bool)
    y, x = np.mgrid[:height, :width] + 0.5
    for mask, several in zip(masks, boxes, strict=True):
        for box in several:
            x1, y1, x2, y2 = box
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                raise ValueError(f"boxes: expected 0 <= x1 < x2 <= {width}, 0 <= y1 < y2 <= {height}, received {box}")
            mask |= (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
    return masks


def lift(map_HW: np.ndarray, mask_HW: np.ndarray) -> float:
    """(mass in mask / mass) / (pixels in mask / pixels)."""
    return float(map_HW[mask_HW].sum() / map_HW.sum() / mask_HW.mean())


def points_inside(map_HW: np.ndarray, mask_HW: np.ndarray) -> bool:
    """The maximum lies in the mask; of a plateau at least half."""
    highest = map_HW >= map_HW.max() * (1 - 1e-9)  # bilinear weights sum to one only up to rounding
    return bool(mask_HW[highest].mean() >= 0.5)


def localisation(maps: ArrayLike, masks: ArrayLike) -> Localisation:
    """AUROC, lift and pointing game of maps (N, h, w) against masks (N, H, W), means over images.

    Raises:
        ValueError: a mask that is empty or the whole image, a map that is negative, not finite or zero throughout.
    """
    masks_NHW = np.asarray(masks).astype(bool)
    if masks_NHW.ndim != 3 or not len(masks_NHW) or len(masks_NHW) != len(np.asarray(maps)):
        raise ValueError(f"masks: expected ({len(np.asarray(maps))}, height, width), received {masks_NHW.shape}")
    share_N = masks_NHW.mean((1, 2))
    if bad := np.flatnonzero((share_N == 0) | (share_N == 1)).tolist():
        raise ValueError(f"masks: expected a part of each image, received none or all of it for images {bad[:5]}")
    maps_NHW = resize(maps, *masks_NHW.shape[1:])
    usable_N = np.isfinite(maps_NHW).all((1, 2)) & (maps_NHW.min((1, 2)) >= 0) & (maps_NHW.max((1, 2)) > 0)
    if bad := np.flatnonzero(~usable_N).tolist():
        raise ValueError(f"maps: expected finite values of at least 0 and one above, received others for {bad[:5]}")
    pairs = list(zip(maps_NHW, masks_NHW, strict=True))
    return Localisation(
        auroc=interval([float(roc_auc_score(mask.ravel(), one.ravel())) for one, mask in pairs]),
        lift=interval([lift(one, mask) for one, mask in pairs]),
        pointing=ratio([points_inside(one, mask) for one, mask in pairs]),
    )
