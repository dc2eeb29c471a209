# SPDX-License-Identifier: Apache-2.0
"""What every clusterer does to its features first: check them, put the rows in an order of their own, standardise.

Rows are sorted by a hash of their bits before anything random happens, so that the order in which images
were read changes nothing but the order of the labels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.rank import directions

CONSTANT = 1e-6
"""A feature with a smaller standard deviation carries nothing and is dropped."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """The options that all clusterers share."""

    num_clusters: int
    standardize: bool = True
    """Raw features of a masked autoencoder are dominated by a few dimensions; False keeps their scale."""
    l2: bool = True
    min_rank: int = 5
    """Fewer directions than this holding 95 % of the variance mean a collapsed encoder."""
    sample_size: int = 262_144
    """Larger sets are fitted on a uniform sample of this many rows and labelled in one pass."""

    def __post_init__(self) -> None:
        for name in ("num_clusters", "min_rank", "sample_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaler:
    num_features: int
    kept: Tensor  # (d,) int64, the features that vary
    mean: Tensor  # (d,)
    std: Tensor  # (d,)
    l2: bool

    def transform(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise UsageError(
                "these features do not fit the clusters",
                expected=f"(rows, {self.num_features})",
                received=tuple(features.shape),
                hint="use the encoder and the pooling that the clusters were fitted with",
            )
        x_ND = features.detach().float()
        if len(self.kept) < self.num_features:
            x_ND = x_ND[:, self.kept]
        x_ND = (x_ND - self.mean) / self.std
        check_finite(x_ND)
        return torch.nn.functional.normalize(x_ND, dim=1) if self.l2 else x_ND


class Prepared(NamedTuple):
    rows: Tensor  # (n,) the rows the fit sees, in an order that depends on their content only
    x: Tensor  # (n, d) transformed
    scaler: Scaler
    health: dict[str, Any]


def prepare(features: Tensor, config: FeatureConfig, generator: torch.Generator) -> Prepared:
    keys_N = row_keys(features)
    rows = keys_N.argsort(stable=True)
    if len(rows) > config.sample_size:
        rows = rows[torch.randperm(len(rows), generator=generator)[: config.sample_size]]
    distinct = len(keys_N[rows].unique())
    if distinct < config.num_clusters:
        raise UsageError(
            "there are fewer different rows than clusters",
            expected=f"at least {config.num_clusters} distinct rows for {config.num_clusters} clusters",
            received=f"{distinct} distinct rows of {len(features)}",
            hint=f"at most {distinct} clusters",
        )
    seen_nD = features[rows].detach().float()
    scaler = fit_scaler(seen_nD, config)
    rank = check_rank(seen_nD, scaler, config.min_rank)
    dropped = sorted(set(range(features.shape[1])) - set(scaler.kept.tolist()))
    health = {"rank": rank, "dropped_features": dropped, "duplicate_share": 1 - distinct / len(rows)}
    return Prepared(rows, scaler.transform(seen_nD), scaler, health)


def row_keys(features: Tensor, chunk_rows: int = 8192) -> Tensor:
    """64 bits a row: equal rows have equal keys, wherever they stand."""
    mixer = torch.Generator().manual_seed(0)
    weights_D = torch.randint(-(2**62), 2**62, (features.shape[1],), generator=mixer) * 2 + 1
    chunks = [chunk.detach().float() + 0.0 for chunk in features.split(chunk_rows)]  # + 0.0 turns -0.0 into 0.0
    return torch.cat([(chunk.contiguous().view(torch.int32) * weights_D).sum(1) for chunk in chunks])


def fit_scaler(features: Tensor, config: FeatureConfig) -> Scaler:
    check_finite(features)
    variance_D, mean_D = torch.var_mean(features, dim=0, correction=0)
    kept = (variance_D.sqrt() >= CONSTANT).nonzero().flatten()
    if len(kept) == 0:
        raise UsageError("features are collapsed: every one is constant, so the encoder cannot cluster")
    mean, std = mean_D[kept], variance_D[kept].sqrt()
    if not config.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return Scaler(num_features=features.shape[1], kept=kept, mean=mean, std=std, l2=config.l2)


def check_rank(features: Tensor, scaler: Scaler, min_rank: int) -> int:
    """Number of principal directions that hold 95 % of the variance; too few raise."""
    rank = directions(features[:, scaler.kept])
    bound = min(min_rank, scaler.num_features)
    if rank < bound:
        raise UsageError(
            "features are collapsed: the encoder cannot cluster",
            expected=f"at least {bound} directions holding 95 % of the variance",
            received=f"{rank} of {scaler.num_features}",
            hint="train the encoder longer, or lower min_rank if the data really are this simple",
        )
    return rank


def check_finite(features: Tensor) -> None:
    bad = (~torch.isfinite(features)).any(1).nonzero().flatten()
    if len(bad):
        first = ", ".join(map(str, bad[:5].tolist()))
        raise UsageError("features hold NaN or infinity", received=f"{len(bad)} such rows, first {first}")
