# SPDX-License-Identifier: Apache-2.0
"""Assignment and balanced transport against the matmul X @ C.T they cannot do without, and against their peers.

N 100,000 rows, K 64 clusters, D 384 features, float32, two threads. Every number is a ratio to the matmul of the
same round, median over the rounds.
"""

import math
import os
from collections.abc import Callable

import faiss
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor
from torch.nn.functional import normalize

from anabranch.allocate.clusters.capacity import capacity_labels
from anabranch.allocate.clusters.record import CHUNK_ROWS, nearest, nearest_labels
from anabranch.allocate.clusters.sinkhorn import sinkhorn_plan
from benchmarks._timing import compare

N, K, D = 100_000, 64, 384
EPSILON = 0.05
THREADS = 2


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    """Rows in forty loose groups, on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=generator)
    group = torch.randint(0, 40, (rows,), generator=generator)
    return normalize(centres[group] + 2 * torch.randn(rows, dim, generator=generator), dim=1)


def log_form(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """What most implementations do: a log-sum-exp over all scores twice an iteration."""
    logits = scores / epsilon
    log_v = scores.new_zeros(scores.shape[1])
    for _ in range(iterations):
        log_u = -math.log(len(scores)) - torch.logsumexp(logits + log_v, 1)
        log_v = -math.log(scores.shape[1]) - torch.logsumexp(logits + log_u[:, None], 0)
    log_u = -math.log(len(scores)) - torch.logsumexp(logits + log_v, 1)
    return (logits + log_u[:, None] + log_v).exp()


def assignment_cases(x: Tensor, centroids: Tensor) -> dict[str, Callable[[], object]]:
    index = faiss.IndexFlatL2(D)
    index.add(centroids.numpy())

    def with_margins() -> None:
        for chunk in x.split(CHUNK_ROWS):
            nearest(chunk, centroids, "cosine")

    return {
        "matmul X @ C.T": lambda: x @ centroids.T,
        "anabranch, cosine labels": lambda: nearest_labels(x, centroids, "cosine"),
        "anabranch, Euclidean labels": lambda: nearest_labels(x, centroids, "euclidean"),
        "anabranch, label + distance + margin": with_margins,
        "faiss IndexFlatL2": lambda: index.search(x.numpy(), 1),
        "sklearn pairwise_distances_argmin": lambda: pairwise_distances_argmin(x.numpy(), centroids.numpy()),
        "torch.cdist + argmin": lambda: torch.cdist(x, centroids).argmin(1),
    }


def many_clusters_cases(x: Tensor, centroids: Tensor) -> dict[str, Callable[[], object]]:
    cases = assignment_cases(x, centroids)
    return {name: cases[name] for name in ("matmul X @ C.T", "anabranch, cosine labels", "faiss IndexFlatL2")}


def transport_cases(x: Tensor, centroids: Tensor) -> dict[str, Callable[[], object]]:
    scores = x @ centroids.T

    def balanced() -> Tensor:
        plan = sinkhorn_plan(scores, EPSILON, iterations=3, tolerance=0.0)
        return capacity_labels(scores + EPSILON * plan.log_v, -(-N // K))

    return {
        "matmul X @ C.T": lambda: x @ centroids.T,
        "anabranch plan, 3 iterations": lambda: sinkhorn_plan(scores, EPSILON, iterations=3, tolerance=0.0),
        "log form, 3 iterations": lambda: log_form(scores, EPSILON, 3),
        "anabranch plan + exact sizes": balanced,
    }


def hard_balance_quality() -> tuple[float, float]:
    """Score of the balanced labels over that of the exact optimum; largest difference of the plan to the log form."""
    x = unit_rows(1000, 32, seed=1)
    scores = x @ x[:8].T
    slots = scores.repeat(1, 125)
    exact = slots[linear_sum_assignment(-slots.numpy())].mean()
    labels = capacity_labels(scores + 0.02 * sinkhorn_plan(scores, 0.02).log_v, 125)
    difference = sinkhorn_plan(scores, EPSILON, 3, 0.0).matrix(scores, EPSILON) - log_form(scores, EPSILON, 3)
    return (scores.gather(1, labels[:, None]).mean() / exact).item(), difference.abs().max().item() * len(scores)


def print_table(title: str, cases: dict[str, Callable[[], object]], bars: dict[str, float], rounds: int) -> None:
    print(f"\n{title}")
    for name, ratio in compare(cases, "matmul X @ C.T", rounds=rounds).items():
        bar = bars.get(name)
        verdict = "" if bar is None else f"  bar <= {bar:.2f}: {'met' if ratio.median <= bar else 'MISSED'}"
        print(f"  {name:<38} {ratio.median:6.2f} x  {1000 * ratio.seconds:8.1f} ms{verdict}")


def main(rounds: int = 9) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    try:
        x, centroids = unit_rows(N, D, seed=0), unit_rows(K, D, seed=2)
        print(f"clustering: N {N:,}, K {K}, D {D}, float32, {THREADS} threads, median of {rounds} interleaved rounds")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; above 1 it delays every barrier")
        bars = {"anabranch, cosine labels": 1.15, "anabranch, Euclidean labels": 1.15}
        print_table("one assignment pass", assignment_cases(x, centroids), bars, rounds)
        many = many_clusters_cases(x, unit_rows(4 * K, D, seed=3))
        print_table(f"one assignment pass, K {4 * K}", many, bars, rounds)
        bars = {"anabranch plan, 3 iterations": 1.0}
        print_table("balanced transport, scores given", transport_cases(x, centroids), bars, rounds)
        quality, difference = hard_balance_quality()
        met = "met" if quality >= 0.995 else "MISSED"
        print(f"\nexact sizes: {quality:.2%} of the exact assignment's score (N 1,000, K 8)  bar >= 99.50%: {met}")
        met = "met" if difference <= 1e-5 else "MISSED"
        print(f"scaling form against log form: {difference:.1e} of a row's mass  bar <= 1.0e-05: {met}")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
