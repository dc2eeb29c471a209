# SPDX-License-Identifier: Apache-2.0
"""K-means: the plain clusters, and the control of every balanced one.

Paper     : Lloyd 1982; k-means++ seeding of Arthur and Vassilvitskii 2007. scikit-learn does the work.
Equation  : min over C, a of sum_n ||x_n - C_{a_n}||^2, the best of R restarts.
Shapes    : N rows, d kept features, K clusters.
Differs   : rows are standardised and put on the unit sphere first (options); the random numbers depend on the
            content of the rows, not on their order.
Check     : K = distinct rows -> inertia 0; K = 1 -> the total variance (tests/allocate/clusters/test_kmeans.py).
"""

from dataclasses import asdict, dataclass

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from anabranch.allocate.clusters.features import FeatureConfig, prepare
from anabranch.allocate.clusters.record import Clustering, finish


@dataclass(frozen=True, kw_only=True)
class Config(FeatureConfig):
    restarts: int = 10
    """One start often ends in a poor optimum, even on four clear blobs."""
    max_iterations: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("restarts", "max_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")


def lloyd(
    x: Tensor, num_clusters: int, generator: torch.Generator, restarts: int = 10, max_iterations: int = 300
) -> tuple[Tensor, float]:
    """Centroids (K, d) and the sum of squared distances to them."""
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    model = KMeans(num_clusters, n_init=restarts, max_iter=max_iterations, random_state=seed)
    with threadpool_limits(limits=1):  # with three threads or more the order of its sums, and so the result, varies
        model.fit(x.cpu().numpy())
    return torch.from_numpy(model.cluster_centers_).float(), float(model.inertia_)


def fit(features: Tensor, config: Config, generator: torch.Generator) -> Clustering:
    prepared = prepare(features, config, generator)
    centroids_Kd, inertia = lloyd(prepared.x, config.num_clusters, generator, config.restarts, config.max_iterations)
    draft = Clustering(
        centroids=centroids_Kd,
        log_bias=None,
        scaler=prepared.scaler,
        metric="euclidean",
        method="allocate/clusters/kmeans",
        config=asdict(config),
        seed=generator.initial_seed(),
        health=prepared.health | {"inertia": inertia},
    )
    return finish(draft, features, prepared.x)
