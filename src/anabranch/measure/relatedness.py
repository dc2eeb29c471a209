# SPDX-License-Identifier: Apache-2.0
"""Which source does a task look like? No labels, no training: nearest centroids in one feature space.

Paper     : none; a generalisation of the assignment step of Liu et al. 2023 (arXiv 2402.05382).
Equation  : r(t, i) = share of t's images whose nearest centroid belongs to source i; agreement = share of tasks where
            argmax_i r(t, i) is the source that transferred best.
Shapes    : features (N, D); C centroids a source, k-means in the standardised space of all sources.
Differs   : every source gets equally many centroids, so that a large source is not nearer by number alone.
Check     : a task drawn from one source is related to it (tests/measure/test_relatedness.py).
"""

import numpy as np
from sklearn.cluster import KMeans

from anabranch.errors import UsageError


def relatedness(
    task_features: list[np.ndarray], source_features: list[np.ndarray], num_centroids: int = 8, seed: int = 0
) -> np.ndarray:
    """r (tasks, sources); every row sums to one."""
    together = np.concatenate(source_features)
    if not all(np.isfinite(features).all() for features in (together, *task_features)):
        raise UsageError(
            "the features hold values that are not finite", hint="the model diverged: lower its learning rate"
        )
    mean, spread = together.mean(0), together.std(0)
    scale = np.where(spread > 1e-7, spread, 1)
    centroids, owner = [], []
    for i, features in enumerate(source_features):
        count = min(num_centroids, len(np.unique(features, axis=0)))
        model = KMeans(count, n_init=2, random_state=seed).fit((features - mean) / scale)
        centroids.append(model.cluster_centers_)
        owner += [i] * count
    stacked, owners = np.concatenate(centroids), np.asarray(owner)
    rows = []
    for features in task_features:
        squared = (stacked**2).sum(1) - 2 * ((features - mean) / scale) @ stacked.T
        rows.append(np.bincount(owners[squared.argmin(1)], minlength=len(source_features)) / len(features))
    return np.stack(rows)


def agreement(related: np.ndarray, best: list[int]) -> float:
    """Share of tasks whose most related source is the one that transferred best."""
    return float(np.mean(related.argmax(1) == np.asarray(best)))
