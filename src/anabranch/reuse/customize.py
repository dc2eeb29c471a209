# SPDX-License-Identifier: Apache-2.0
"""Choose the route that serves a task, by where its images fall among the clusters, without labels or search.

Paper     : MoCE, Liu et al. 2023 (arXiv 2402.05382): the task takes the expert of its largest cluster.
Equation  : h[k] = images of the task in cluster k;  cluster: k* = argmax h;
            path: H[r] = sum of h[k] over clusters k whose route (R_1[k], .., R_L[k]) is r, then argmax H.
Shapes    : K clusters, L routed layers, routes (L, K) the expert of every cluster in every layer.
Differs   : the vote is over routes by default: clusters that share every expert are one choice, so that a close race
            between two of them decides nothing.
Check     : hand-made votes, ties, and a planted domain (tests/reuse/test_customize.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOW_COVERAGE = 0.3
OUTSIDE_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """The route that serves a task, and how clear the vote was."""

    cluster: int
    """The largest cluster on the route."""
    path: tuple[int, ...]
    """The expert of each routed layer, in order."""
    coverage: float
    """Share of the task's images whose own cluster takes this route."""
    histogram: Tensor  # (K,)

    @property
    def entropy(self) -> float:
        """exp of this is the effective number of clusters that the task falls into; in nats."""
        share = self.histogram / self.histogram.sum()
        return float(torch.special.entr(share).sum())


def histogram(labels: Tensor, num_clusters: int) -> Tensor:
    """h[k] = images of the task in cluster k."""
    return torch.bincount(labels, minlength=num_clusters)


def path_votes(counts: Tensor, routes: Tensor) -> dict[tuple[int, ...], int]:
    """H[r] = sum of h[k] over clusters k with route r, most votes first."""
    votes: dict[tuple[int, ...], int] = {}
    for cluster, count in enumerate(counts.tolist()):
        route = tuple(routes[:, cluster].tolist())
        votes[route] = votes.get(route, 0) + count
    return dict(sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])))


def choose(labels: Tensor, routes: Tensor, select: str) -> Choice:
    """The winner of the vote; ties go to the smaller cluster, or route."""
    counts = histogram(labels, routes.shape[1])
    path = (
        tuple(routes[:, int(counts.argmax())].tolist())
        if select == "cluster"
        else next(iter(path_votes(counts, routes)))
    )
    return along(path, counts, routes)


def along(path: tuple[int, ...], counts: Tensor, routes: Tensor) -> Choice:
    """The choice of one route, with its share of the votes."""
    on_path = (routes == torch.tensor(path)[:, None]).all(0)
    if not on_path.any():
        raise ValueError(f"path: expected a route that some cluster takes, received {path}")
    coverage = float(counts[on_path].sum() / counts.sum())
    return Choice(int(torch.where(on_path, counts, -1).argmax()), path, coverage, counts)


def warnings(choice: Choice, distances: Tensor, training_p95: float) -> list[str]:
    """What a person should know before using the model."""
    found = []
    if choice.coverage < LOW_COVERAGE:
        found.append(
            f"only {choice.coverage:.0%} of the task's images take the chosen route: the task spans several kinds of "
            "images, compare with the plain model (--method mae)"
        )
    top = choice.histogram.sort(descending=True).values
    if len(top) > 1 and top[0] == top[1] and choice.coverage < 1:
        tied = (choice.histogram == top[0]).nonzero().flatten().tolist()
        found.append(f"clusters {tied} tie with {int(top[0])} images each")
    outside = float((distances > training_p95).float().mean())
    if outside > OUTSIDE_SHARE:
        found.append(
            f"{outside:.0%} of the task's images lie farther from their cluster than 95 % of the training images: "
            "the task is mostly outside of what was learned"
        )
    return found


def facts(choice: Choice, distances: Tensor, training_p95: float) -> dict[str, Any]:
    """What customize.json says about the choice."""
    top = choice.histogram.sort(descending=True, stable=True)
    return {
        "cluster": choice.cluster,
        "path": list(choice.path),
        "coverage": choice.coverage,
        "entropy": choice.entropy,
        "effective_clusters": float(torch.tensor(choice.entropy).exp()),
        "histogram": choice.histogram.tolist(),
        "top_clusters": [
            {"cluster": k, "images": n}
            for k, n in zip(top.indices[:5].tolist(), top.values[:5].tolist(), strict=True)
            if n
        ],
        "mean_distance": float(distances.mean()),
        "training_distance_p95": training_p95,
        "outside_share": float((distances > training_p95).float().mean()),
        "warnings": warnings(choice, distances, training_p95),
    }
