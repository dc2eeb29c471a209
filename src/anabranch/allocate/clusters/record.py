# SPDX-License-Identifier: Apache-2.0
"""The record of a clustering: what was found, how, in what health, and how new images are assigned to it.

Kept as `clusters.safetensors` and `clusters.json`, never as a pickle.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.allocate.clusters.features import Scaler
from anabranch.errors import AnabranchError, UsageError

FORMAT = "anabranch.clusters/1"
CHUNK_ROWS = 16_384
"""Rows that are transformed at a time."""
BLOCK_SCORES = 2**21
"""Scores held at a time, 8 MB: few enough to stay in the cache, enough to keep the threads busy."""
ENOUGH = 40
"""Images that a cluster should have before an expert is trained on it."""


class Assignment(NamedTuple):
    labels: Tensor  # (N,) int64
    distance: Tensor  # (N,) to the nearest centroid: 1 - cosine, or Euclidean
    margin: Tensor  # (N,) second-best minus best distance; small for an image at a border


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    centroids: Tensor  # (K, d) float32, in the transformed space
    log_bias: Tensor | None  # (K,) log v of the balanced plan
    scaler: Scaler
    metric: str
    method: str
    config: dict[str, Any]
    seed: int
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """(N,) the training set in the order it was given; `finish` fills labels and sizes in."""
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (K,)
    feature_name: str = "features"
    encoder_sha256: str | None = None
    health: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.centroids)

    def transform(self, features: Tensor) -> Tensor:
        """Features as the centroids see them: constant ones dropped, standardised, on the unit sphere."""
        return self.scaler.transform(features)

    def assign(self, features: Tensor, chunk_rows: int = CHUNK_ROWS) -> Assignment:
        """The nearest centroid of *new* rows. The bias belongs to the training set's balance and is not used."""
        parts = [nearest(self.transform(chunk), self.centroids, self.metric) for chunk in features.split(chunk_rows)]
        return Assignment(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def training_labels(self, features: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
        """a_n = argmax_k s_nk / epsilon + log v_k: the label of rows that belong to the training set."""
        return torch.cat([*self.training_chunks(features, chunk_rows)])

    def training_chunks(self, features: Tensor, chunk_rows: int = CHUNK_ROWS, start: int = 0) -> Iterator[Tensor]:
        """`training_labels` in pieces, for a set that does not fit in memory; `start` resumes a stopped pass."""
        bias_K = None if self.log_bias is None else self.config["epsilon"] * self.log_bias
        for i in range(start, len(features), chunk_rows):
            yield nearest_labels(self.transform(features[i : i + chunk_rows]), self.centroids, self.metric, bias_K)

    @property
    def health_line(self) -> str:
        h = self.health
        return (
            f"{len(self)} clusters of {h['min_size']}-{h['max_size']} images (median {h['median_size']}, "
            f"effective {h['effective_clusters']:.1f}), {h['border_share']:.1%} at a border, feature rank {h['rank']}"
        )

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"centroids": self.centroids, "sizes": self.sizes, "labels": self.labels}
        tensors |= {f"scaler.{name}": getattr(self.scaler, name) for name in ("kept", "mean", "std")}
        if self.log_bias is not None:
            tensors["log_bias"] = self.log_bias
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / "clusters.safetensors")
        facts = {"format": FORMAT, "num_features": self.scaler.num_features, "l2": self.scaler.l2}
        facts |= {name: getattr(self, name) for name in _FACTS}
        (folder / "clusters.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Clustering":
        tensors, facts = _read(Path(folder))
        scaler_tensors = {name: tensors[f"scaler.{name}"] for name in ("kept", "mean", "std")}
        return cls(
            centroids=tensors["centroids"],
            log_bias=tensors.get("log_bias"),
            scaler=Scaler(num_features=facts["num_features"], l2=facts["l2"], **scaler_tensors),
            sizes=tensors["sizes"],
            labels=tensors["labels"],
            **{name: facts[name] for name in _FACTS},
        )


_FACTS = ("metric", "method", "config", "seed", "feature_name", "encoder_sha256", "health")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for name in ("clusters.safetensors", "clusters.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}: it is a TokenMoE or a partial run")
    try:
        facts = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "clusters.safetensors")
        found = facts["format"]
        complete = {*_FACTS} <= {*facts} and {"centroids", "sizes", "labels", "scaler.kept"} <= {*tensors}
    except Exception as error:  # safetensors raises a class of its own, outside the usual families
        raise AnabranchError(f"the clusters in {folder} cannot be read", received=error) from error
    if found != FORMAT or not complete:
        raise AnabranchError(f"the clusters in {folder} are of another format", expected=FORMAT, received=found)
    return tensors, facts


def scores(x: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """s_nk = x_n.c_k + bias_k; larger is nearer."""
    return torch.mm(x, columns, out=out) if bias is None else torch.addmm(bias, x, columns, out=out)


def score_bias(centroids: Tensor, metric: str, bias: Tensor | None = None) -> Tensor | None:
    """What a centroid's score has besides x.c: nothing for the cosine, -|c|^2 / 2 for the Euclidean order."""
    if metric == "cosine":
        return bias
    half_K = centroids.square().sum(1) / 2
    return -half_K if bias is None else bias - half_K


def nearest_labels(x: Tensor, centroids: Tensor, metric: str, bias: Tensor | None = None) -> Tensor:
    """argmax_k x.c_k + bias_k, holding never more than BLOCK_SCORES scores, in memory that is kept."""
    added_K = score_bias(centroids, metric, bias)
    columns_dK = centroids.T.contiguous()
    block = max(BLOCK_SCORES // len(centroids), 1)
    scores_BK = x.new_empty(min(block, len(x)), len(centroids))
    labels_N = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for i in range(0, len(x), block):
        rows, out = x[i : i + block], scores_BK[: len(x) - i]
        labels_N[i : i + block] = row_argmax(scores(rows, columns_dK, added_K, out))
    return labels_N


def row_argmax(scores: Tensor) -> Tensor:
    """NumPy's argmax is vectorised along a row and torch's is not: half the time on a CPU."""
    return scores.argmax(1) if scores.is_cuda else torch.from_numpy(np.argmax(scores.numpy(), axis=1))


def nearest(x: Tensor, centroids: Tensor, metric: str) -> Assignment:
    scores_NK = scores(x, centroids.T, score_bias(centroids, metric))
    labels_N = row_argmax(scores_NK)
    best_N = scores_NK.gather(1, labels_N[:, None]).squeeze(1)
    second_N = scores_NK.scatter_(1, labels_N[:, None], -torch.inf).amax(1)
    if metric == "cosine":
        return Assignment(labels_N, 1 - best_N, best_N - second_N)
    square_N = x.square().sum(1)
    best_N, second_N = ((square_N - 2 * score_N).clamp(min=0).sqrt() for score_N in (best_N, second_N))
    return Assignment(labels_N, best_N, second_N - best_N)


def finish(draft: Clustering, features: Tensor, x: Tensor, labels: Tensor | None = None) -> Clustering:
    """Label the whole training set (unless the method did), count, and add the health that every method reports.

    `x` are the transformed rows that the fit saw; the shares in the health are taken over them.
    """
    labels_N = draft.training_labels(features) if labels is None else labels
    sizes_K = torch.bincount(labels_N, minlength=len(draft))
    if sizes_K.min() == 0:
        empty = (sizes_K == 0).nonzero().flatten().tolist()
        raise UsageError("some clusters got no image", received=f"empty clusters {empty}", hint="fewer clusters")
    health = draft.health | size_health(sizes_K) | {"border_share": border_share(x, draft)}
    health["assign_agreement"] = (draft.assign(features).labels == labels_N).float().mean().item()
    health["warnings"] = health.get("warnings", []) + size_warnings(len(labels_N), len(draft), health)
    return replace(draft, labels=labels_N, sizes=sizes_K, health=health)


def size_warnings(num_images: int, num_clusters: int, health: dict[str, Any]) -> list[str]:
    warnings = []
    if num_images < ENOUGH * num_clusters:
        fewer = max(num_images // ENOUGH, 1)
        warnings.append(f"{num_images} images cannot feed {num_clusters} clusters; with {ENOUGH} each use {fewer}")
    if health["duplicate_share"] > 0.05:
        warnings.append(f"{health['duplicate_share']:.0%} of the images are duplicates of others")
    return warnings


def size_health(sizes: Tensor) -> dict[str, Any]:
    share_K = sizes / sizes.sum()
    return {
        "min_size": int(sizes.min()),
        "median_size": int(sizes.median()),
        "max_size": int(sizes.max()),
        "effective_clusters": torch.special.entr(share_K).sum().exp().item(),
    }


def border_share(x: Tensor, clustering: Clustering) -> float:
    """Share of rows whose margin is under 5 % of the median distance: they could as well be elsewhere."""
    found = [nearest(chunk, clustering.centroids, clustering.metric) for chunk in x.split(CHUNK_ROWS)]
    distance_N, margin_N = (torch.cat(column) for column in zip(*(part[1:] for part in found), strict=True))
    return (margin_N < 0.05 * distance_N.median()).float().mean().item()
