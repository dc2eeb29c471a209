# SPDX-License-Identifier: Apache-2.0
"""Discovery: are there groups at all, and how many? Every index is read against data that has no groups.

Equation  : z(K) = (s(K) - mean_b s_b(K)) / sd_b s_b(K),  s = mean silhouette,
            s_b = the same on draw b from one Gaussian with the mean and the covariance of the data.
Shapes    : N points, D features, K clusters, B reference draws.
Differs   : the reference is our rule. How many clusters an *allocation* should have is a question no index answers.
Check     : four blobs, K = 4 -> z > 10; one Gaussian -> every z < 3 (tests/measure/clusters/test_structure.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from anabranch.errors import UsageError

Z_BAR = 3.0


@dataclass(frozen=True, kw_only=True)
class StructureRow:
    num_clusters: int
    silhouette: float
    reference_mean: float
    reference_sd: float

    @property
    def z(self) -> float:
        return (self.silhouette - self.reference_mean) / max(self.reference_sd, 1e-6)


@dataclass(frozen=True, kw_only=True)
class StructureTable:
    rows: tuple[StructureRow, ...]

    @property
    def num_clusters(self) -> int | None:
        """The K with the largest silhouette among those that stand out from the reference, if any does."""
        real = [row for row in self.rows if row.z >= Z_BAR]
        return max(real, key=lambda row: row.silhouette).num_clusters if real else None

    @property
    def sentence(self) -> str:
        if self.num_clusters is None:
            return "no structure beyond one blob"
        row = next(row for row in self.rows if row.num_clusters == self.num_clusters)
        return f"{row.num_clusters} groups: silhouette {row.silhouette:.3f}, {row.z:.1f} sd above one blob"


def purity(labels: Tensor, reference: Tensor) -> float:
    """Share of points that belong to the most frequent reference group of their own cluster."""
    if len(labels) != len(reference):
        raise UsageError("purity compares two labellings", expected=f"{len(labels)} labels", received=len(reference))
    counts = contingency_matrix(reference.cpu().numpy(), labels.cpu().numpy())
    return float(counts.max(axis=0).sum() / counts.sum())


def one_blob(points: Tensor, generator: torch.Generator) -> Tensor:
    """As many points from one Gaussian with the mean and the covariance of `points`."""
    centred_ND = points.double() - points.double().mean(0)
    noise_NN = torch.randn(len(points), len(points), dtype=torch.float64, generator=generator)
    blob_ND: Tensor = (
        noise_NN @ centred_ND / len(points) ** 0.5
    )  # X^T G with Gaussian G has covariance X^T X, of any rank
    return (blob_ND + points.double().mean(0)).to(points.dtype)


def structure_table(
    points: Tensor,
    num_clusters: Sequence[int],
    fit: Callable[[Tensor, int, torch.Generator], Tensor],
    generator: torch.Generator,
    num_references: int = 10,
    max_points: int = 2000,
) -> StructureTable:
    """Silhouette of `fit(points, K, generator) -> labels` for each K, on the data and on the references.

    The silhouette needs all pairs, so a random `max_points` of the points stand for the rest.
    """
    if num_references < 2 or min(num_clusters) < 2:
        raise UsageError("the structure table needs two references and K of at least 2", received=list(num_clusters))
    if len(points) > max_points:
        points = points[torch.randperm(len(points), generator=generator)[:max_points]]
    references = [one_blob(points, generator) for _ in range(num_references)]
    rows = []
    for count in num_clusters:
        own = _silhouette(points, fit(points, count, generator))
        blank = [_silhouette(blob, fit(blob, count, generator)) for blob in references]
        rows.append(
            StructureRow(
                num_clusters=count,
                silhouette=own,
                reference_mean=float(np.mean(blank)),
                reference_sd=float(np.std(blank, ddof=1)),
            )
        )
    return StructureTable(rows=tuple(rows))


def _silhouette(points: Tensor, labels: Tensor) -> float:
    return float(silhouette_score(points.cpu().numpy(), labels.cpu().numpy()))
