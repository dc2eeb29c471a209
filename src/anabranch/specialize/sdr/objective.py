# SPDX-License-Identifier: Apache-2.0
"""SiamKD: sub-nets learn from their own clusters, and from what the model of all images makes of the other view.

Paper     : SDR, Liu et al., AAAI 2022 (arXiv 2205.13267); the equation of its distillation could not be read.
Equation  : L = 1/M sum over the step's turns of  L_ssl(B_k; W_k) + beta L_kd(B_k; W_k, W_0),  the shared model's own
            turns without L_kd;  L_kd = 1/2 D(p1_k, z2_0) + 1/2 D(p2_k, z1_0),  D(p, z) = -cos(p, stopgrad z),
            z_0 from W_0 by batch statistics;  beta falls linearly to half of kd_coef over a phase ("anneal").
Shapes    : M turns a step, each a contiguous part of the batch; pixels (B, V = 2, C, H, W), predictions (B / M, d).
Differs   : L_kd, its weight and its schedule are ours; weight 1 cost 5 points (small nets, one seed). A teacher in
            eval mode ruins the sub-nets; likely its running statistics lag behind weights that all paths move, its
            embeddings share an offset, and to predict that is to collapse. The shared model has turns in a fixed share
            of the steps, instead of a coin toss. Every path has heads of its own (sdr/heads).
            BYOL's target is a copy of the super-net that starts anew with each phase and moves on a step's paths alone.
Check     : the teacher gets no gradient and is not asked at beta = 0 (tests/specialize/sdr/test_objective.py);
            two processes equal one (tests/jobs/transfer/test_sdr.py).
Exempt    : off (nothing is added that could be switched off)
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anabranch.specialize.sdr.channels import SHARED, SplitBatchNorm
from anabranch.specialize.sdr.heads import follow_paths, of_row
from anabranch.specialize.sdr.supernet import SuperNet, grow, parent_rows
from anabranch.specialize.simsiam import NUM_LARGE, negative_cosine, spread, views_in

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    ssl: Literal["simsiam", "byol"] = "simsiam"
    kd_coef: float = 0.25
    """beta; 0 asks no teacher."""
    kd_schedule: Literal["constant", "anneal"] = "anneal"
    kd_view: Literal["cross", "same"] = "cross"
    """Which view's embedding the sub-net predicts; the same one lets it copy the teacher."""
    heads: Literal["own", "common"] = "own"
    """A projector and a predictor for every path, or a pair for all."""
    target_momentum: float = 0.996
    """tau of BYOL's target at the start of a phase; 1 at its end."""

    def __post_init__(self):
        if self.kd_coef < 0:
            raise ValueError(f"kd_coef: expected at least 0, received {self.kd_coef}")
        if not 0 <= self.target_momentum <= 1:
            raise ValueError(f"target_momentum: expected 0..1, received {self.target_momentum}")


def simsiam_loss(predictions: Pair, targets: Pair) -> Tensor:
    """1/2 D(p1, z2) + 1/2 D(p2, z1)."""
    return (negative_cosine(predictions[0], targets[1]) + negative_cosine(predictions[1], targets[0])) / 2


def byol_loss(predictions: Pair, targets: Pair) -> Tensor:
    """(2 - 2 cos(p1, z2')) + (2 - 2 cos(p2, z1'))."""
    return 4 + 4 * simsiam_loss(predictions, targets)


def distillation(predictions: Pair, taught: Pair, view: str) -> Tensor:
    """1/2 D(p1, z2_0) + 1/2 D(p2, z1_0), or the same views."""
    return simsiam_loss(predictions, taught if view == "cross" else (taught[1], taught[0]))


def kd_weight(config: Config, progress: float) -> float:
    """beta at this share of a phase."""
    return config.kd_coef * (1 - progress / 2 if config.kd_schedule == "anneal" else 1)


def momentum(config: Config, progress: float) -> float:
    """tau = 1 - (1 - tau_0) (cos(pi progress) + 1) / 2."""
    return 1 - (1 - config.target_momentum) * (math.cos(math.pi * progress) + 1) / 2


class SubnetLearning(nn.Module):
    """Objective of one phase: batch of `PathBatches` -> {"loss", "siamese", "distill", "spread"}."""

    def __init__(self, net: SuperNet, projector: nn.Module, predictor: nn.Module, config: Config, total_steps: int):
        """Heads are plain ones, or those of the phase before as `grown` hands them over."""
        super().__init__()
        self.net, self.config, self.total_steps = net, config, total_steps
        self.projector, self.predictor = (_of_net(head, net, config) for head in (projector, predictor))
        self.target = nn.ModuleList()
        if config.ssl == "byol":
            self.target = copy.deepcopy(nn.ModuleList([self.net, self.projector])).requires_grad_(False)

    def follows(self) -> list[str]:
        """Names, as patterns, of tensors that change without a gradient."""
        kinds = ("running_mean", "running_var", "shared_mean", "shared_var")
        return ["target.*", *(f"*.{kind}" for kind in kinds)]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        progress = int(batch["step"][0]) / self.total_steps
        if self.training:
            self.follow(set(batch["turns"][0].tolist()), momentum(self.config, progress))
        views, beta = views_in(batch, self.training), kd_weight(self.config, progress)
        pixels_BV, mine = torch.stack(views, 1), list(turns(batch["path"], batch["turns"].shape[1]))
        losses, spreads, pupils = [], [], []
        for rows, row in mine:
            loss, predictions, narrowness = self.learn(row, pixels_BV[rows])
            losses.append(loss)
            spreads.append(narrowness)
            if row != SHARED:
                pupils.append((pixels_BV[rows], predictions))
        if self.training:
            self.share_statistics([row for _, row in mine])
        siamese = torch.stack(losses).mean()
        distill = beta * self.distill(pupils) / len(mine) if pupils and beta > 0 else siamese.new_zeros(())
        return {
            "loss": siamese + distill,
            "siamese": siamese,
            "distill": distill,
            "spread": torch.stack(spreads).amin(),
        }

    def learn(self, row: int, pixels_BV: Tensor) -> tuple[Tensor, Pair, Tensor]:
        """Of one turn the loss, the predictions, and the spread of the embeddings."""
        embedded = embed(self.net.activate(row, views=NUM_LARGE), self.projector, pixels_BV)
        first, second = pair(embedded)
        predictions = pair(self.predictor(embedded))
        if self.config.ssl == "byol":
            return byol_loss(predictions, self.followed(row, pixels_BV)), predictions, spread(first)
        return simsiam_loss(predictions, (first, second)), predictions, spread(first)

    def distill(self, pupils: Sequence[tuple[Tensor, Pair]]) -> Tensor:
        """Sum over turns, given as pixels and predictions, of L_kd; the teacher sees all turns in one pass."""
        taught = self.taught([pixels for pixels, _ in pupils])
        view = self.config.kd_view
        losses = [distillation(mine, theirs, view) for (_, mine), theirs in zip(pupils, taught, strict=True)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def taught(self, turns: Sequence[Tensor]) -> list[Pair]:
        """z_0 of every turn's views by that turn's statistics; the shared model's running ones stay as they are."""
        pixels_BV = torch.stack(turns, 1).flatten(1, 2)
        teacher = self.net.activate(SHARED, frozen=True, views=pixels_BV.shape[1])
        of_views = embed(teacher, self.projector, pixels_BV).unflatten(0, pixels_BV.shape[:2]).unbind(1)
        return list(zip(of_views[::NUM_LARGE], of_views[1::NUM_LARGE], strict=True))

    # BYOL's target -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def followed(self, row: int, pixels_BV: Tensor) -> Pair:
        """z' of both views from the target's own path."""
        net, projector = self.target
        return pair(embed(net.activate(row, views=NUM_LARGE), projector, pixels_BV))

    @torch.no_grad()
    def follow(self, rows: set[int], tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta, for weights on the step's paths alone, before they are asked."""
        if not len(self.target):
            return
        wanted = set().union(*(self.net.parameters_of(row) for row in rows))
        followers = dict(self.target[0].named_parameters())
        for name, parameter in self.net.named_parameters():
            if name in wanted:
                followers[name].lerp_(parameter, 1 - tau)
        for head, target in {of_row(self.projector, row): of_row(self.target[1], row) for row in rows}.items():
            for follower, parameter in zip(target.parameters(), head.parameters(), strict=True):
                follower.lerp_(parameter, 1 - tau)

    # Several processes ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def share_statistics(self, mine: Sequence[int]) -> None:
        """Every process gets the running statistics that the others have just changed: a path learns in one of them."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        own = torch.cat([buffer.flatten() for row in mine for buffer in self.statistics(row)])
        rows = torch.tensor(mine, device=own.device)
        everyones_rows = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyones_rows, rows)
        sizes = [sum(b.numel() for row in found.tolist() for b in self.statistics(row)) for found in everyones_rows]
        everyones = own.new_zeros(len(sizes), max(sizes))
        padded = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
        distributed.all_gather_into_tensor(everyones.view(-1), padded)
        for found, values in zip(everyones_rows, everyones, strict=True):
            start = 0
            for buffer in [b for row in found.tolist() for b in self.statistics(row)]:
                # past autograd: the backward to come holds these buffers and, having batch statistics, never reads them
                buffer.data.copy_(values[start : start + buffer.numel()].view_as(buffer))
                start += buffer.numel()

    def statistics(self, row: int) -> Iterator[Tensor]:
        """Views of all running statistics of a path."""
        for part in (self.net, of_row(self.projector, row), of_row(self.predictor, row)):
            for module in part.modules():
                if isinstance(module, SplitBatchNorm):
                    yield from module.statistics(row)


def embed(net: nn.Module, projector: nn.Module, pixels_BV: Tensor) -> Tensor:
    """z (B V, d) of all views on the active path in one pass: half the convolutions, twice as large."""
    embedded: Tensor = projector(net(pixels_BV.flatten(0, 1)))
    return embedded


def pair(of_views: Tensor) -> Pair:
    """(B V, d) -> (B, d) of the first view and of the second."""
    first, second = of_views.unflatten(0, (-1, NUM_LARGE)).unbind(1)
    return first, second


def turns(path: Tensor, num_turns: int) -> Iterator[tuple[slice, int]]:
    """(rows, path) of each turn among these rows of the batch: all of the step's, or those of one process."""
    changes = (path[1:] != path[:-1]).nonzero()[:, 0] + 1
    bounds = [0, *changes.tolist(), len(path)]
    if len(bounds) - 1 > num_turns:
        raise ValueError(f"path: expected at most {num_turns} contiguous turns, received {len(bounds) - 1}")
    for start, end in itertools.pairwise(bounds):
        yield slice(start, end), int(path[start])


def grown(before: SubnetLearning, paths: Sequence[tuple[int, ...]], num_split: int, total_steps: int) -> SubnetLearning:
    """The objective of the next phase: the net split further, heads with statistics for the new paths."""
    net = grow(before.net, paths, num_split)
    rows, own = parent_rows(before.net, paths), before.config.heads == "own"
    heads = [follow_paths(head, rows, net.active, own=own) for head in (before.projector, before.predictor)]
    return SubnetLearning(net, *heads, before.config, total_steps)


def _of_net(head: nn.Module, net: SuperNet, config: Config) -> nn.Module:
    """The head as it is where it already follows this net's paths, else one that does."""
    norms = [module for module in head.modules() if isinstance(module, SplitBatchNorm)]
    if norms and norms[0].active is net.active:
        return head
    return follow_paths(head, range(len(net.paths)), net.active, own=config.heads == "own")
