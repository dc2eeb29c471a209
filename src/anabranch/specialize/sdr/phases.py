# SPDX-License-Identifier: Apache-2.0
"""Data-aware progressive training: the net and the data are divided further from phase to phase, together.

Phase 0   : nothing is split, one model learns from all images; its features give the clusters.
Phase p   : the last p stages are split; a path for every node of the cluster tree at depth p learns from the clusters
            below it. The digits of a path are the branches taken: the first one belongs to the last stage, so that
            deep stages, which carry meaning, are divided first.
At once   : without progress there is a single phase with all stages split.
Shapes    : N images with labels (N,) of K clusters, digits (K, P) of P split stages, S stages in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.schedule import PathBatches, PathIndices, Rounds, Views
from anabranch.specialize.sdr.supernet import Path


@dataclass(frozen=True)
class Phase:
    num_split: int
    steps: int
    paths: tuple[Path, ...]
    of_cluster: Tensor  # (K,) the row of the path that learns from each cluster


def plan(digits: Tensor, num_stages: int, steps: int, *, progressive: bool = True) -> list[Phase]:
    """The phases after phase 0, which divide `steps` equally; the last takes what is left over.

    Args:
        digits: (K, P) as allocate/clusters/tree grows them.
    """
    depth = digits.shape[1]
    depths = range(1, depth + 1) if progressive else [depth]
    if depth > num_stages:
        raise ValueError(f"digits: expected at most {num_stages} for as many stages, received {depth}")
    if steps < len(depths):
        raise ValueError(f"steps: expected at least one for each of {len(depths)} phases, received {steps}")
    each = steps // len(depths)
    lengths = [each] * (len(depths) - 1) + [steps - each * (len(depths) - 1)]
    return [phase(digits[:, :level], num_stages, length) for level, length in zip(depths, lengths, strict=True)]


def phase(prefixes: Tensor, num_stages: int, steps: int) -> Phase:
    """One phase, from the first digits (K, p) of every cluster."""
    nodes, of_cluster = prefixes.unique(dim=0, return_inverse=True)
    level = prefixes.shape[1]
    paths = tuple((0,) * (num_stages - level) + tuple(reversed(node)) for node in nodes.tolist())
    return Phase(level, steps, paths, of_cluster)


def members(phase: Phase, labels: Tensor) -> list[Tensor]:
    """For each path the indices of its images."""
    rows = phase.of_cluster[labels]
    return [(rows == row).nonzero()[:, 0] for row in range(len(phase.paths))]


def rounds(phase: Phase, turns_a_step: int, shared_share: float, seed: int) -> Rounds:
    return Rounds(len(phase.paths), turns_a_step, shared_share, derived_seed("phase", seed, phase.num_split))


def batches(
    phase: Phase, rounds: Rounds, labels: Tensor, batch_size: int, views: Callable[[PathIndices], Views]
) -> PathBatches:
    """The stream of a phase; `views(indices)` makes the views of the images that a step asks for."""
    return PathBatches(views(PathIndices(rounds, members(phase, labels), len(labels), batch_size)), rounds)


@dataclass(frozen=True)
class Account:
    """What was spent in all, and what of it reached one path: sub-nets share weights, so both have to be told."""

    total_steps: int
    images_seen: int
    steps_touching_path: list[int]
    images_seen_by_path: list[int]
    steps_touching_shared: int
    images_seen_by_shared: int


def account(base_steps: int, phases: Sequence[Phase], schedules: Sequence[Rounds], batch_size: int) -> Account:
    """Steps and images of phase 0, then of a path's turns, and of its ancestors' in the phases before."""
    steps, images = [], []
    last = phases[-1]
    first_clusters = [int((last.of_cluster == row).nonzero()[0]) for row in range(len(last.paths))]
    for cluster in [*first_clusters, None]:
        rows = [SHARED if cluster is None else int(phase.of_cluster[cluster]) for phase in phases]
        turns = [s.turns_of(row, phase.steps) for s, row, phase in zip(schedules, rows, phases, strict=True)]
        shares = [t * (batch_size // s.turns_a_step) for t, s in zip(turns, schedules, strict=True)]
        steps.append(base_steps + sum(turns))
        images.append(base_steps * batch_size + sum(shares))
    total = base_steps + sum(phase.steps for phase in phases)
    return Account(total, total * batch_size, steps[:-1], images[:-1], steps[-1], images[-1])
