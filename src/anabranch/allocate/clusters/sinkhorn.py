# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn clusters: balanced clusters by entropic optimal transport between images and centroids.

Paper     : SDR (arXiv 2205.13267), MoCE (arXiv 2402.05382); the solver is that of Cuturi 2013 (arXiv 1306.0895).
Equation  : max over Q of <Q, S> + epsilon H(Q),  rows of Q sum to 1/N, columns to r_k;  S = F C^T, |f_n| = |C_k| = 1
            Q = diag(u) exp(S / epsilon) diag(v);  u <- (1/N) / (M v),  v <- r / (M^T u)
            C_k <- l2norm(sum_n Q_nk f_n);  a_n = argmax_k Q_nk;  repeated until labels rest.
Shapes    : N rows, d kept features, K clusters.
Differs   : the papers' constants could not be read: epsilon, iterations and rounds are ours. Scaling form with the row
            maximum taken out, and the logarithm of v absorbed whenever v is about to leave float32.
Check     : M = [[2, 1], [1, 3]] -> Q_11 = 0.355051; the log form to 1e-5 (tests/allocate/clusters/test_sinkhorn.py).
"""

from dataclasses import asdict, dataclass, replace
from math import ceil, floor, inf, log
from typing import Any, NamedTuple

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor
from torch.nn.functional import normalize

from anabranch.allocate.clusters.capacity import capacity_labels
from anabranch.allocate.clusters.features import FeatureConfig, prepare
from anabranch.allocate.clusters.kmeans import lloyd
from anabranch.allocate.clusters.record import CHUNK_ROWS, Clustering, finish, nearest_labels, row_argmax
from anabranch.errors import UsageError
from anabranch.measure.clusters.structure import purity

SAFE = 1e15
"""Column scalings beyond this (or under its inverse) are absorbed: float32 ends at 1e38."""
MINIMUM_FACTOR = 0.5
"""Capacity rounding gives every cluster at least this part of its target."""
PURE = 0.9
"""Balanced clusters that are less pure than this against k-means are worth a word."""
NATURAL_ROWS = 5_000
"""Plain k-means runs beside the plan on at most this many rows: enough to compare partitions, in little time."""


@dataclass(frozen=True, kw_only=True)
class Config(FeatureConfig):
    epsilon: float = 0.05
    """Larger softens the plan until its argmax is no longer balanced; smaller needs more iterations."""
    iterations: int = 100
    tolerance: float = 1e-3
    """Largest relative error of a cluster's mass at which the inner loop stops."""
    rounds: int = 30
    moved_share: float = 1e-3
    """The outer loop stops when fewer than this share of the rows change their label."""
    target_alpha: float = 1.0
    """r_k = alpha / K + (1 - alpha) (share of cluster k in k-means): 1 is equal sizes, 0.5 gives way to nature."""
    capacity_factor: float | None = None
    """Bound every training size to [0.5, factor] x its target; 1.1 is a good value. None keeps the plan's argmax."""
    max_size_ratio: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "tolerance", "iterations", "rounds"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name}: expected above 0, received {getattr(self, name)}")
        if not 0 <= self.moved_share <= 1:
            raise ValueError(f"moved_share: expected 0..1, received {self.moved_share}")
        if not 1 <= self.max_size_ratio < inf:
            raise ValueError(f"max_size_ratio: expected at least 1, received {self.max_size_ratio}")
        if not 0 <= self.target_alpha <= 1:
            raise ValueError(f"target_alpha: expected 0..1, received {self.target_alpha}")
        if self.capacity_factor is not None and not 1 <= self.capacity_factor < inf:
            raise ValueError(f"capacity_factor: expected at least 1, received {self.capacity_factor}")
        if not self.l2:
            raise ValueError("l2: expected True (the plan compares cosines), received False")


class Plan(NamedTuple):
    log_u: Tensor  # (N,)
    log_v: Tensor  # (K,) centred: the plan does not change when a constant moves from v to u
    error: float
    """Largest relative error of a column sum; the row sums are exact."""
    iterations: int

    def matrix(self, scores: Tensor, epsilon: float) -> Tensor:
        """Q = diag(u) exp(S / epsilon) diag(v)."""
        return torch.add(self.log_v, scores, alpha=1 / epsilon).add_(self.log_u[:, None]).exp_()


def sinkhorn_plan(
    scores: Tensor,
    epsilon: float,
    iterations: int = 100,
    tolerance: float = 1e-3,
    target: Tensor | None = None,
    log_v: Tensor | None = None,
) -> Plan:
    """Scale exp(S / epsilon) to rows of 1/N and columns of `target` (1/K); `log_v` is a warm start."""
    N, K = scores.shape
    scores = scores.float()
    target_K = scores.new_full((K,), 1 / K) if target is None else target.to(scores)
    base_K = scores.new_zeros(K) if log_v is None else log_v
    kernel_NK, peak_N = _kernel(scores, epsilon, base_K)
    v_K = torch.ones_like(base_K)
    for iteration in range(iterations + 1):
        u_N = (kernel_NK @ v_K).reciprocal_()
        column_K = u_N @ kernel_NK / N
        error = (v_K * column_K / target_K - 1).abs().max().item()
        if error < tolerance or iteration == iterations:
            break
        v_K = target_K / column_K
        if not (v_K.max() < SAFE and v_K.min() > 1 / SAFE):
            base_K = _log_column_step(scores, epsilon, u_N.log() - peak_N - log(N), target_K)
            kernel_NK, peak_N = _kernel(scores, epsilon, base_K)
            v_K = torch.ones_like(base_K)
    log_v_K = base_K + v_K.log()
    centre = log_v_K.mean()
    return Plan(u_N.log() - peak_N - log(N) + centre, log_v_K - centre, error, iteration)


def _kernel(scores: Tensor, epsilon: float, log_v: Tensor) -> tuple[Tensor, Tensor]:
    """exp(S / epsilon + log v) with the largest entry of every row scaled to 1, and the logarithm of that scale."""
    kernel_NK = torch.add(log_v, scores, alpha=1 / epsilon)
    peak_N = kernel_NK.amax(1)
    return kernel_NK.sub_(peak_N[:, None]).exp_(), peak_N


def _log_column_step(scores: Tensor, epsilon: float, log_u: Tensor, target: Tensor) -> Tensor:
    """log v = log r - log(M^T u), where M^T u itself would leave float32."""
    return target.log() - torch.logsumexp(scores / epsilon + log_u[:, None], 0)


def fit(features: Tensor, config: Config, generator: torch.Generator) -> Clustering:
    prepared = prepare(features, config, generator)
    natural_n, repeat_purity = natural_labels(prepared.x, config.num_clusters, generator)
    seeds_Kd, target_K = start(prepared.x, natural_n, config, generator)
    centroids_Kd, plan, rounds = transport(prepared.x, seeds_Kd, target_K, config)
    draft = Clustering(
        centroids=centroids_Kd,
        log_bias=plan.log_v,
        scaler=prepared.scaler,
        metric="cosine",
        method="allocate/clusters/sinkhorn",
        config=asdict(config),
        seed=generator.initial_seed(),
        health=prepared.health | {"rounds": rounds, "column_error": plan.error},
    )
    labels_N = hard_labels(draft, features, target_K, config)
    check_sizes(labels_N, target_K, config)
    balance = balance_health(labels_N[prepared.rows], natural_n, repeat_purity)
    return finish(replace(draft, health=draft.health | balance), features, prepared.x, labels_N)


def natural_labels(x: Tensor, num_clusters: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Labels of plain k-means, and the purity of a second k-means against them: how sure the groups themselves are."""
    pair = [lloyd(x[:NATURAL_ROWS], num_clusters, generator, restarts=2)[0] for _ in range(2)]
    labels, again = (nearest_labels(x, centroids, "euclidean") for centroids in pair)
    return labels, purity(again, labels)


def start(x: Tensor, natural: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First centroids and the target shares r. Shares taken from k-means belong to its own centroids."""
    K = config.num_clusters
    if config.target_alpha < 1:
        counts_K = torch.bincount(natural, minlength=K)
        sums_Kd = torch.zeros(K, x.shape[1]).index_add_(0, natural, x)
        shares_K = counts_K.double() / len(x)
        return normalize(sums_Kd, dim=1), config.target_alpha / K + (1 - config.target_alpha) * shares_K
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    seeds, _ = kmeans_plusplus(x.numpy(), K, random_state=seed)
    return normalize(torch.from_numpy(seeds), dim=1), torch.full((K,), 1 / K, dtype=torch.float64)


def transport(x: Tensor, centroids: Tensor, target: Tensor, config: Config) -> tuple[Tensor, Plan, int]:
    """Plan and centroids in turn; the plan that is returned belongs to the centroids that are returned."""
    labels_n, log_v = torch.full((len(x),), -1), None
    for turn in range(1, config.rounds + 1):
        scores_nK = x @ centroids.T
        plan = sinkhorn_plan(scores_nK, config.epsilon, config.iterations, config.tolerance, target, log_v)
        log_v = plan.log_v
        before_n, labels_n = labels_n, row_argmax(scores_nK + config.epsilon * log_v)
        if (labels_n != before_n).float().mean() < config.moved_share or turn == config.rounds:
            break
        centroids = normalize(plan.matrix(scores_nK, config.epsilon).T @ x, dim=1)
    return centroids, plan, turn


def hard_labels(draft: Clustering, features: Tensor, target: Tensor, config: Config) -> Tensor:
    """The plan's argmax, or its capacity rounding, which needs the scores of all rows at once."""
    if config.capacity_factor is None:
        return draft.training_labels(features)
    chunks = [draft.transform(chunk) @ draft.centroids.T for chunk in features.split(CHUNK_ROWS)]
    scores_NK = torch.cat(chunks).add_(config.epsilon * draft.log_bias)
    fair_K = (len(features) * target).tolist()
    capacity = torch.tensor([ceil(config.capacity_factor * fair - 1e-6) for fair in fair_K])  # 100.0000001 is 100
    minimum = torch.tensor([max(1, floor(MINIMUM_FACTOR * fair)) for fair in fair_K])
    return capacity_labels(scores_NK, capacity, minimum)


def check_sizes(labels: Tensor, target: Tensor, config: Config) -> None:
    """Test the hard sizes: the soft marginals of a plan can be perfect while its argmax is useless."""
    sizes_K = torch.bincount(labels, minlength=config.num_clusters)
    relative_K = sizes_K / target
    if config.capacity_factor is None and relative_K.max() > config.max_size_ratio * relative_K.min():
        raise UsageError(
            f"epsilon {config.epsilon} is too large: the hard clusters are not balanced",
            expected=f"sizes within a factor of {config.max_size_ratio:g} of one another",
            received=f"{int(sizes_K.min())}-{int(sizes_K.max())} images",
            hint=f"epsilon {config.epsilon / 4:g} with more iterations, or capacity_factor 1.1",
        )


def balance_health(labels: Tensor, natural: Tensor, repeat_purity: float) -> dict[str, Any]:
    """Does balance cost natural groups? Purity of the balanced clusters against plain k-means."""
    found = purity(labels, natural)
    warnings = []
    if found < PURE and found < repeat_purity - 0.05:
        warnings.append(
            f"balance splits and mixes natural groups: purity {found:.2f} against k-means, which repeats itself to "
            f"{repeat_purity:.2f}; try more clusters or target_alpha 0.5, and look at both contact sheets"
        )
    elif found < PURE:
        warnings.append(
            f"the clusters are a choice, not a discovery: k-means repeats itself only to {repeat_purity:.2f}, "
            f"the balanced clusters agree with it to {found:.2f}"
        )
    return {"purity_vs_kmeans": found, "kmeans_repeat_purity": repeat_purity, "warnings": warnings}
