# SPDX-License-Identifier: Apache-2.0
"""Convolutions and norms whose channels divide into common ones and groups, one group for each choice of a stage.

Layout    : of the C channels that a sub-net sees, the first `common` belong to every path, the rest to the group that
            the path takes at that stage; the super-net holds common + G (C - common) of them.
Storage   : one parameter a block (rows of one part, columns of one part). A path joins its blocks to the plain weight.
            What a path does not use gets no gradient at all, so neither momentum nor weight decay can move it, and
            two paths that share a digit share the very tensor.
Full net  : all groups side by side in one convolution; where a row receives from several groups it takes their mean, so
            that activations keep the scale of a sub-net's.
Views     : V views of each image pass as one batch (B V, ..), each view normalised by statistics of its own: to the
            norm they are V times as many channels, which is a matter of shape alone.
Shapes    : a plain weight is (C_out, C_in, kernel, kernel); running statistics are (P, C), a row for each path.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COMMON = "common"
SHARED = -1
"""In place of a path's number: the model of all images."""
MOMENTUM = 0.1


@dataclass(frozen=True)
class Layout:
    """How the channels at one place divide; one that is not split has common channels only."""

    channels: int
    common: int
    groups: int
    stage: int
    """Whose digit names the group."""

    @property
    def individual(self) -> int:
        return self.channels - self.common

    @property
    def width(self) -> int:
        """Channels of the super-net."""
        return self.common + self.groups * self.individual

    def parts(self) -> list[str]:
        return [COMMON, *(str(group) for group in range(self.groups))]

    def part(self, path: tuple[int, ...]) -> list[str]:
        """The parts that a path sees, in the order of a plain model's channels."""
        return [COMMON, str(path[self.stage])] if self.groups else [COMMON]

    def span(self, part: str) -> slice:
        """Where a part lies among the channels of a plain model."""
        return slice(0, self.common) if part == COMMON else slice(self.common, self.channels)


def unsplit(channels: int, stage: int = 0) -> Layout:
    return Layout(channels, channels, 0, stage)


@dataclass
class Active:
    """Which path the modules of a super-net compute; one object that all of them look at."""

    path: tuple[int, ...] | None = None
    """A digit for each stage; None is the full net."""
    row: int = SHARED
    """The path's row in the running statistics."""
    frozen: bool = False
    """Norms leave their running statistics alone: how a teacher is asked in training."""
    views: int = 1
    """Rows v, V + v, 2 V + v, .. of a batch in training are view v and have statistics of their own."""


class Statistics(NamedTuple):
    means: Tensor  # (P, C)
    variances: Tensor  # (P, C)
    shared_mean: Tensor  # (C,), or (width,) of the full net
    shared_variance: Tensor


@dataclass(frozen=True)
class Source:
    """Where new blocks come from: by a module's name and a path, the plain tensors of the model that is split."""

    weight: Callable[[str, tuple[int, ...]], Tensor]
    bias: Callable[[str, tuple[int, ...]], Tensor]
    statistics: Callable[[str, Layout], Statistics]
    paths: tuple[tuple[int, ...], ...]
    """Every path that will be taken: only blocks on one of them are made."""


class SplitConv2d(nn.Module):
    def __init__(self, like: nn.Conv2d, name: str, rows: Layout, columns: Layout, source: Source, active: Active):
        super().__init__()
        if like.groups != 1 or like.bias is not None:
            raise ValueError(f"{name}: expected a convolution without groups and bias, received {like}")
        self.rows, self.columns, self.active = rows, columns, active
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.blocks = nn.ParameterDict()
        for path in source.paths:
            for row in rows.part(path):
                for column in columns.part(path):
                    if f"{row}_{column}" not in self.blocks:
                        block = source.weight(name, path)[rows.span(row), columns.span(column)]
                        self.blocks[f"{row}_{column}"] = nn.Parameter(block.detach().clone())

    def keys_of(self, path: tuple[int, ...] | None) -> list[str]:
        """Blocks that a path computes with, or all of them."""
        if path is None:
            return list(self.blocks)
        return [f"{row}_{column}" for row in self.rows.part(path) for column in self.columns.part(path)]

    def weight(self, path: tuple[int, ...]) -> Tensor:
        """(C_out, C_in, k, k) of a path, as a plain convolution has it."""
        columns = self.columns.part(path)
        return torch.cat([torch.cat([self.blocks[f"{r}_{c}"] for c in columns], 1) for r in self.rows.part(path)])

    def full_weight(self) -> Tensor:
        """(width of rows, width of columns, k, k): every block at its place, the mean over what a row receives."""
        return torch.cat([torch.cat(self._full_row(row), 1) for row in self.rows.parts()])

    def _full_row(self, row: str) -> list[Tensor]:
        common = self.blocks[f"{row}_{COMMON}"]
        groups = self.columns.parts()[1:]
        count = sum(f"{row}_{group}" in self.blocks for group in groups)
        empty = common.new_zeros(len(common), self.columns.individual, *common.shape[2:])
        own = [self.blocks[f"{row}_{g}"] / count if f"{row}_{g}" in self.blocks else empty for g in groups]
        return [common, *own]

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.full_weight() if self.active.path is None else self.weight(self.active.path)
        return F.conv2d(hidden, weight, None, self.stride, self.padding, self.dilation)


class SplitBatchNorm(nn.Module):
    """Batch norm for 2- or 4-dimensional input; scales are shared like channels, statistics by nobody."""

    def __init__(self, affine: bool, eps: float, name: str, layout: Layout, source: Source, active: Active):
        super().__init__()
        self.affine, self.eps, self.layout, self.active = affine, eps, layout, active
        self.scales, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for path in source.paths if affine else ():
            for part in layout.part(path):
                if part not in self.scales:
                    self.scales[part] = nn.Parameter(source.weight(name, path)[layout.span(part)].detach().clone())
                    self.biases[part] = nn.Parameter(source.bias(name, path)[layout.span(part)].detach().clone())
        found = source.statistics(name, layout)
        self.register_buffer("running_mean", found.means.detach().clone())
        self.register_buffer("running_var", found.variances.detach().clone())
        self.register_buffer("shared_mean", found.shared_mean.detach().clone())
        self.register_buffer("shared_var", found.shared_variance.detach().clone())

    def weight(self, path: tuple[int, ...]) -> Tensor | None:
        return _joined(self.scales, self.layout.part(path))

    def bias(self, path: tuple[int, ...]) -> Tensor | None:
        return _joined(self.biases, self.layout.part(path))

    def statistics(self, row: int) -> tuple[Tensor, Tensor]:
        """Views: (C,) mean and variance of a path, or of the shared model; one row serves whoever asks."""
        if row == SHARED:
            return self.shared_mean, self.shared_var
        row = min(row, len(self.running_mean) - 1)
        return self.running_mean[row], self.running_var[row]

    def forward(self, hidden: Tensor) -> Tensor:
        active = self.active
        parts = self.layout.parts() if active.path is None else self.layout.part(active.path)
        weight, bias = _joined(self.scales, parts), _joined(self.biases, parts)
        running = self.statistics(active.row)
        if not self.training:
            return F.batch_norm(hidden, *running, weight, bias, False, MOMENTUM, self.eps)
        V = active.views
        wide = hidden.reshape(-1, V * hidden.shape[1], *hidden.shape[2:])
        weight, bias = (None if x is None else x.repeat(V) for x in (weight, bias))
        after = (None, None) if active.frozen else [statistic.repeat(V) for statistic in running]
        normed = F.batch_norm(wide, *after, weight, bias, True, MOMENTUM, self.eps)
        if not active.frozen:
            for statistic, of_views in zip(running, after, strict=True):
                follow_views(statistic, of_views.view(V, -1))
        return normed.reshape(hidden.shape)


@torch.no_grad()
def follow_views(statistic: Tensor, of_views: Tensor) -> None:
    """From what a running statistic (C,) became by each view alone (V, C) to what it becomes by one after another."""
    decay_V = (1 - MOMENTUM) ** torch.arange(len(of_views) - 1, -1, -1, dtype=statistic.dtype, device=statistic.device)
    statistic += decay_V @ (of_views - statistic)


class SplitIdentity(nn.Module):
    """A shortcut without weights: the channels pass; in the full net those of one layout become those of another."""

    def __init__(self, source: Layout, target: Layout, active: Active):
        super().__init__()
        self.source, self.target, self.active = source, target, active

    def forward(self, hidden: Tensor) -> Tensor:
        if self.active.path is not None or self.source == self.target:
            return hidden
        return spread_over_groups(mean_over_groups(hidden, self.source), self.target)


def _joined(parameters: nn.ParameterDict, parts: Iterable[str]) -> Tensor | None:
    return torch.cat([parameters[part] for part in parts]) if len(parameters) else None


def mean_over_groups(full: Tensor, layout: Layout) -> Tensor:
    """(B, width, ...) -> (B, C, ...): [common ; mean over groups of the individual channels]."""
    if not layout.groups:
        return full
    groups = full[:, layout.common :].unflatten(1, (layout.groups, layout.individual))
    return torch.cat([full[:, : layout.common], groups.mean(1)], 1)


def spread_over_groups(plain: Tensor, layout: Layout) -> Tensor:
    """(B, C, ...) -> (B, width, ...): every group gets the same individual channels."""
    if not layout.groups:
        return plain
    return torch.cat([plain[:, : layout.common], *[plain[:, layout.common :]] * layout.groups], 1)
