# SPDX-License-Identifier: Apache-2.0
"""Which sub-net serves a task: by neighbours on its labels, or where its images fall; extracted and proven."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.transfer.clusters import check_encoder
from anabranch.jobs.transfer.corpus import at_most
from anabranch.jobs.transfer.embed import CHUNK, embed
from anabranch.jobs.transfer.pretrain_sdr import load_subnets
from anabranch.jobs.transfer.settings import CustomizeSettings
from anabranch.models import resnet
from anabranch.reuse.nearest import Margin, best, leave_one_out, margin
from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.supernet import SuperNet

PROOF_IMAGES = 64
SCORE_IMAGES = 2000
PREFILTER = 16
"""Sub-nets that are scored with labels: those with the largest clusters among the task's images."""
BASE = -2
"""In place of a path's number: the model before any split."""
OUTSIDE_SHARE = 0.5
TIMED_ROUNDS = 15
ORIGIN = (
    "A plain ResNet, taken out of a super-net with one sub-net for every cluster of images (SDR, arXiv 2205.13267)."
)


def choose_and_extract(
    settings: CustomizeSettings, task: Images, summary: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The task's dense model, and what is to be said about it."""
    base, clusters = resnet.load(settings.run / "base"), Clustering.load(settings.run / "clusters")
    check_encoder(clusters, base, settings.run)
    net, of_cluster = load_subnets(settings.run)
    found = clusters.assign(embed(base, task))
    counts = images_of_paths(found.labels, of_cluster, len(net.paths))
    if settings.select == "knn":
        row, said = by_labels(net, base, counts, task)
    else:
        row, said = by_histogram(counts, found.distance, found.labels, of_cluster)
    said["outside_share"] = float((found.distance > clusters.health["distance_p95"]).float().mean())
    said["warnings"] += outside_warning(said["outside_share"])
    dense, facts = extracted(net, base, row, task, settings.keep)
    said["how"] += facts.pop("how", "")
    path = None if row == BASE else net.path_of(row)
    said |= {"path": list(path or ()), "model": name_of(net, row), "histogram": counts.tolist(), **facts}
    return dense, {"method": "sdr", "select": settings.select, "origin": ORIGIN, **said}


def images_of_paths(labels: Tensor, of_cluster: Tensor, num_paths: int) -> Tensor:
    """(P,): how many of the task's images lie in the clusters of each path."""
    return torch.bincount(of_cluster[labels], minlength=num_paths)


def outside_warning(share: float) -> list[str]:
    if share <= OUTSIDE_SHARE:
        return []
    return [
        f"{share:.0%} of the task's images lie farther from their cluster than 95 % of the training images: "
        "the task is mostly outside of what was learned"
    ]


def extracted(net: SuperNet, base: nn.Module, row: int, task: Images, keep: float) -> tuple[nn.Module, dict[str, Any]]:
    """The chosen model by itself, proven equal, narrowed if asked for, and timed."""
    dense = base if row == BASE else net.extract(row)
    facts: dict[str, Any] = {"largest_difference": 0.0 if row == BASE else proof(net, dense, row, task)}
    if keep < 1:
        dense, budget = narrowed(net, row, dense, task, keep)
        facts |= budget
    return dense, facts | {"latency_ms": latency(dense, task)}


def name_of(net: SuperNet, row: int) -> str:
    if row == BASE:
        return "base"
    return "shared" if row == SHARED else "path " + " ".join(map(str, net.paths[row]))


def by_histogram(counts: Tensor, distance: Tensor, labels: Tensor, of_cluster: Tensor) -> tuple[int, dict[str, Any]]:
    """The sub-net of the clusters that most of the task's images fall into; of equals the nearer."""
    far = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    for row in (counts == counts.max()).nonzero()[:, 0].tolist():
        far[row] = distance[of_cluster[labels] == row].double().mean()
    row = int(far.argmin())
    coverage = float(counts[row] / counts.sum())
    how = f"{coverage:.0%} of the task's {int(counts.sum()):,} images belong to the clusters that it learned from."
    return row, {
        "coverage": coverage,
        "chosen": f"sub-net {row} of {len(counts)}; {how}",
        "how": f"The sub-net was chosen because {how}",
        "warnings": [],
    }


def by_labels(net: SuperNet, base: nn.Module, counts: Tensor, task: Images) -> tuple[int, dict[str, Any]]:
    """The best of the base, the shared model and the likeliest sub-nets, by neighbours left out one at a time."""
    few = at_most(task, SCORE_IMAGES, seed=0)
    likely = counts.argsort(descending=True, stable=True)[:PREFILTER].tolist()
    rows = [BASE, *([SHARED] if net.shared_path is not None else []), *likely]
    try:
        right = [leave_one_out(features_of(net, base, row, few), few.labels) for row in rows]
    except ValueError as error:
        raise UsageError(
            f"{task.name} cannot be scored by its labels", received=error, hint="--select path needs no labels"
        ) from None
    scores = [100 * float(r.float().mean()) for r in right]
    first_path = len(rows) - len(likely)
    plain, special = best(scores[:first_path]), first_path + best(scores[first_path:])
    over_plain = margin(right[special], right[plain], len(rows))
    winner = special if scores[special] > scores[plain] else plain
    runner_up = best([score if i != winner else -1.0 for i, score in enumerate(scores)])
    over_runner_up = margin(right[winner], right[runner_up], len(rows))
    verdict = in_words(over_plain, name_of(net, rows[plain]))
    return rows[winner], {
        "scores": [{"model": name_of(net, row), "knn": score} for row, score in zip(rows, scores, strict=True)],
        "scored_images": len(few),
        "over_runner_up": vars(over_runner_up),
        "over_shared": vars(over_plain),
        "verdict": verdict,
        "chosen": f"{name_of(net, rows[winner])}, {scores[winner]:.1f} % by nearest neighbours; {verdict}",
        "how": f"{name_of(net, rows[winner]).capitalize()} has the best score by nearest neighbours: {verdict}.",
        "warnings": [],
    }


def in_words(over_plain: Margin, plain: str) -> str:
    points = f"{over_plain.mean:+.1f} [{over_plain.low:+.1f}, {over_plain.high:+.1f}] points over the {plain} model"
    if over_plain.shown:
        return f"a sub-net helps: {points}"
    if over_plain.mean <= 0:
        return f"no sub-net helps: the best has {points}"
    return f"no preference is shown: {points}"


def features_of(net: SuperNet, base: nn.Module, row: int, images: Images) -> Tensor:
    if row == BASE:
        return embed(base, images)
    return embed(net.extract(row), images)


@torch.no_grad()
def proof(net: SuperNet, dense: nn.Module, row: int, images: Images) -> float:
    """The extracted model has to give the very features of the active path."""
    pixel_values = resnet.normalise(images.store.read(torch.arange(min(PROOF_IMAGES, len(images)))))
    difference = float((net.activate(row)(pixel_values) - resnet.features(dense, pixel_values)).abs().max())
    if difference > 1e-6:
        raise CheckFailed(
            "the extracted model does not equal the sub-net", expected="at most 1e-6", received=difference
        )
    return difference


def narrowed(net: SuperNet, row: int, full: nn.Module, task: Images, keep: float) -> tuple[nn.Module, dict[str, Any]]:
    """The sub-net with the first channels of its groups, its statistics measured anew on the task's images."""
    if row == BASE:
        raise UsageError("the plain model won, and it has no groups to narrow", hint="--set keep=1")
    if len(task) < 2:
        raise UsageError(
            "the statistics of a narrower model are measured on the task", expected="2 images", received=len(task)
        )
    narrow = recalibrated(net.extract(row, keep=keep), task)
    return narrow, {
        "keep": keep,
        "full_parameters": sum(p.numel() for p in full.parameters()),
        "full_macs": resnet.macs(full),
        "full_latency_ms": latency(full, task),
        "how": f" Of each group's channels {keep:.0%} stay, and its statistics were measured anew on the task's "
        f"images; whole it takes {resnet.macs(full):,} multiply-accumulates an image.",
    }


@torch.no_grad()
def recalibrated(model: nn.Module, images: Images) -> nn.Module:
    """Running statistics as the mean over batches of these images, unaugmented."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches that follow
    few = at_most(images, SCORE_IMAGES, seed=0)
    for rows in torch.arange(len(few)).split(CHUNK):
        if len(rows) > 1:
            resnet.features(model.train(), resnet.normalise(few.store.read(rows)))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def latency(model: nn.Module, images: Images) -> float:
    """Milliseconds for one image, median."""
    pixel_values, times = resnet.normalise(images.store.read(torch.arange(1))), []
    for _ in range(TIMED_ROUNDS):
        started = time.perf_counter()
        resnet.features(model, pixel_values)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
