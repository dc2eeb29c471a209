# SPDX-License-Identifier: Apache-2.0
"""Clusters of what a base sees: found once, kept in RUN/clusters with their health, tied to their encoder."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.allocate.clusters import kmeans, sinkhorn
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.errors import UsageError
from anabranch.jobs.progress import say
from anabranch.jobs.together import first_alone, rank, summed
from anabranch.jobs.transfer.embed import embed_together
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.measure.clusters.stability import stability
from anabranch.models.bridge import bridge
from anabranch.train.publish import replace_folder
from anabranch.train.touch import digest

STABILITY_IMAGES = 2000
STABILITY_RESAMPLES = 5


def obtain_clusters(settings: PretrainSettings, base: nn.Module, images: Images, run: Path, count: int) -> Clustering:
    """Clusters of the base's features: all processes look at images, the first one fits, all read what it found."""
    [missing] = summed(float(rank() == 0 and not (run / "clusters").exists()))
    if missing:
        features = embed_together(base, images)

        def fit() -> Path:
            assert features is not None
            return replace_folder(fit_clusters(settings, base, features, count).save, run / "clusters")

        first_alone(fit)
    clusters = Clustering.load(run / "clusters")
    say(f"clusters: {clusters.health_line}")
    for warning in clusters.health.get("warnings", []):
        say(f"  warning: {warning}")
    return clusters


def fit_clusters(settings: PretrainSettings, base: nn.Module, features: Tensor, count: int) -> Clustering:
    generator = torch.Generator().manual_seed(settings.seed)
    fitted = clusterer(settings, count)(features, generator)
    few = features[torch.randperm(len(features), generator=generator)[:STABILITY_IMAGES]]
    again = clusterer(settings, min(count, len(few) // 2))
    stable = stability(few, lambda rows, g: again(rows, g).labels, generator, num_resamples=STABILITY_RESAMPLES)
    distance = fitted.assign(features).distance
    health = fitted.health | {
        "stability": stable.mean,
        "stability_error": stable.standard_error,
        "distance_p95": float(np.quantile(distance.numpy(), 0.95)),
    }
    if stable.warning:
        health["warnings"] = [*health.get("warnings", []), stable.warning]
    return replace(fitted, health=health, feature_name=bridge(base).FEATURES, encoder_sha256=fingerprint(base))


def clusterer(settings: PretrainSettings, count: int) -> Callable[[Tensor, torch.Generator], Clustering]:
    if settings.clusterer == "kmeans":
        config = kmeans.Config(num_clusters=count, sample_size=settings.fit_images, min_rank=settings.min_rank)
        return lambda features, generator: kmeans.fit(features, config, generator)
    balanced = sinkhorn.Config(
        num_clusters=count,
        sample_size=settings.fit_images,
        target_alpha=settings.mixed_target,
        capacity_factor=settings.capacity_factor,
        min_rank=settings.min_rank,
    )
    return lambda features, generator: sinkhorn.fit(features, balanced, generator)


def fingerprint(model: nn.Module) -> str:
    """sha-256 over all tensors of the encoder, as it would be handed over."""
    plain = bridge(model).to_plain(model)
    return hashlib.sha256("".join(sorted(digest(plain).values())).encode()).hexdigest()


def check_encoder(clusters: Clustering, base: nn.Module, run: Path) -> None:
    """The base has to be the encoder whose features were clustered, or its tasks would be sent anywhere."""
    if clusters.encoder_sha256 != fingerprint(base):
        raise UsageError(
            f"{run}/base is not the encoder that the clusters were found with",
            expected=f"an encoder with the fingerprint {clusters.encoder_sha256}",
            received=fingerprint(base),
            hint="restore RUN/base as pretrain wrote it",
        )


def described(clusters: Clustering) -> dict[str, Any]:
    """What summary.json says about them."""
    return {
        "clusters": {
            "count": len(clusters),
            "sizes": clusters.sizes.tolist(),
            "health": clusters.health,
            "line": clusters.health_line,
        }
    }
