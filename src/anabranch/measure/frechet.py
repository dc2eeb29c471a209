# SPDX-License-Identifier: Apache-2.0
"""How far are generated images from real ones? Two distances between features, with the floor that noise alone has.

Paper     : Heusel et al. 2017 (arXiv 1706.08500), FID; Binkowski et al. 2018 (arXiv 1801.01401), KID.
Equation  : Frechet = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2);
            KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
            k(x, y) = (x y / D + 1)^3.
Shapes    : features (N, D) and (M, D) from whatever network the caller names.
Differs   : the feature space is the caller's and stands in the result: a number in one space says nothing in another.
            Square roots by eigenvalues in fp64; KID on all pairs, not on subsets.
Check     : shifted Gaussians give |shift|^2, diagonal ones sum (s1 - s2)^2; KID is 0 on average between halves
            (tests/measure/test_frechet.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

ENOUGH = 2048
"""Images below which the Frechet distance is mostly its own bias."""
BLOCK = 1024  # rows of the kernel matrix held at once


@dataclass(frozen=True)
class Distances:
    """Generated against real images. A distance at its floor cannot be told from none."""

    frechet: float
    frechet_floor: float
    kid: float
    kid_floor: float
    feature_space: str
    num_reference: int
    num_generated: int
    note: str
    """What to mind when reading the numbers; empty when nothing."""

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def as_features(values: ArrayLike, name: str) -> np.ndarray:
    features = np.asarray(values, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"{name}: expected finite (at least 2 images, features), received {features.shape}")
    return features


def both(reference: ArrayLike, generated: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_features(reference, "reference"), as_features(generated, "generated")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"generated: expected {x.shape[1]} features as in reference, received {y.shape[1]}")
    return x, y


def roots(eigenvalues: np.ndarray) -> np.ndarray:
    """Square roots; what is rounding becomes zero, or its root would be as large as 1e-8."""
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * np.abs(eigenvalues).max()
    return np.asarray(np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0)))


def root(covariance: np.ndarray) -> np.ndarray:
    """C^1/2 of a symmetric C without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * roots(values)) @ vectors.T)


def gaussian_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)."""
    half = root(cov1)
    product = half @ cov2 @ half
    cross = roots(np.linalg.eigvalsh((product + product.T) / 2)).sum()
    squared = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return float(max(squared, 0.0))


def frechet(reference: ArrayLike, generated: ArrayLike) -> float:
    """The distance between the Gaussians of both sets of features."""
    x, y = both(reference, generated)
    cov_x, cov_y = (np.cov(part, rowvar=False).reshape(x.shape[1], -1) for part in (x, y))
    return gaussian_distance(x.mean(0), cov_x, y.mean(0), cov_y)


def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """sum_{i, j} (x_i y_j / D + 1)^3."""
    width = x.shape[1]
    return float(sum(((x[i : i + BLOCK] @ y.T / width + 1) ** 3).sum() for i in range(0, len(x), BLOCK)))


def mean_within(x: np.ndarray) -> float:
    """mean_{i != j} k(x_i, x_j)."""
    diagonal = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()
    return float((kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1)))


def kid(reference: ArrayLike, generated: ArrayLike) -> float:
    """Unbiased squared distance of means under the cubic kernel; slightly below zero when there is none."""
    x, y = both(reference, generated)
    return mean_within(x) + mean_within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def floor(
    features: ArrayLike,
    generator: np.random.Generator,
    distance: Callable[[np.ndarray, np.ndarray], float] = frechet,
    repeats: int = 5,
) -> float:
    """Largest distance between two random halves of one set, over `repeats` splits: what nothing but noise gives.

    The Frechet distance falls with the number of images, so that this floor, of halves, lies above that of the whole.
    """
    x = as_features(features, "features")
    if len(x) < 4 or repeats < 1:
        raise ValueError(f"features: expected at least 4 images and one repeat, received {len(x)} and {repeats}")
    orders = [generator.permutation(len(x)) for _ in range(repeats)]
    return float(max(distance(x[order[: len(x) // 2]], x[order[len(x) // 2 :]]) for order in orders))


def caution(count: int, width: int) -> str:
    """What to mind about a Frechet distance from `count` images of `width` features; empty when nothing."""
    if count < width:
        return f"{count:,} images are fewer than the {width:,} features: the Frechet distance is singular; read KID."
    if count < ENOUGH:
        return f"{count:,} images are fewer than {ENOUGH:,}: the Frechet distance is biased upwards; prefer KID."
    return ""


def distances(
    reference: ArrayLike, generated: ArrayLike, feature_space: str, generator: np.random.Generator
) -> Distances:
    """Both distances with their floors, in the feature space that the caller names."""
    x, y = both(reference, generated)
    return Distances(
        frechet=frechet(x, y),
        frechet_floor=floor(x, generator),
        kid=kid(x, y),
        kid_floor=floor(x, generator, kid),
        feature_space=feature_space,
        num_reference=len(x),
        num_generated=len(y),
        note=caution(min(len(x), len(y)), x.shape[1]),
    )
