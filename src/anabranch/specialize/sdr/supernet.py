# SPDX-License-Identifier: Apache-2.0
"""SDRnet: one super-net that holds a plain network for every path, most of whose weights the paths share.

Paper     : Liu et al., AAAI 2022, "Task-customized Self-supervised Pre-training with Scalable Dynamic Routing"
            (arXiv 2205.13267).
Equation  : path pi = (g_1, .., g_S); its channels in stage s: A_s = common_s + group_{s, g_s};
            W_pi = W[A_s, A_s] inside a stage, W[A_s, A_{s-1}] where it begins; the full net W_0 takes, where a row
            receives from the groups, their mean.
Shapes    : S stages, G groups a split stage, K paths with digits (K, S); a stage of C channels has round(ratio C)
            common ones and G groups of the rest: a path has the plain network's shape and cost.
Differs   : the split ratio and that the last stages are split first are ours. The shared model is by default one more
            path with groups of its own ("anchor"), instead of the full net ("supernet"), which costs several plain
            forwards. Running statistics are kept for each path.
Check     : extraction is bit for bit the active path, a split changes no output
            (tests/specialize/sdr/test_supernet.py).
Exempt    : inf (divided by an infinite variance, a feature is 0)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.models.bridge import transformers
from anabranch.models.resnet import features
from anabranch.specialize.sdr.channels import (
    SHARED,
    Active,
    Layout,
    Source,
    SplitBatchNorm,
    SplitConv2d,
    SplitIdentity,
    Statistics,
    mean_over_groups,
    spread_over_groups,
    unsplit,
)

Path = tuple[int, ...]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True)
class Config:
    groups: int = 4
    """Choices a split stage offers."""
    split_ratio: float = 0.25
    """Share of a stage's channels that all paths have in common, rounded to whole channels."""
    teacher: Literal["anchor", "supernet"] = "anchor"
    """What the model of all images is: a path with groups of its own, or all groups at once."""

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"groups: expected at least 1, received {self.groups}")
        if not 0 < self.split_ratio < 1:
            raise ValueError(f"split_ratio: expected between 0 and 1, both excluded, received {self.split_ratio}")
        if self.teacher not in ("anchor", "supernet"):
            raise ValueError(f"teacher: expected anchor or supernet, received {self.teacher}")


class SuperNet(nn.Module):
    """Features (B, C) of the active path: `net.activate(row)(pixel_values)`. Made by `supernet` and `grow`."""

    def __init__(self, backbone: nn.Module, config: Config, paths: Sequence[Path], active: Active):
        super().__init__()
        self.backbone, self.config, self.paths, self.active = backbone, config, tuple(paths), active

    @property
    def num_split(self) -> int:
        """Split stages, the last ones."""
        return sum(layout.groups > 0 for layout in self.layouts)

    @property
    def shared_path(self) -> Path | None:
        """The anchor's digits, or None for the full net."""
        return _shared_path(self.config, len(self.layouts), self.num_split)

    @property
    def layouts(self) -> list[Layout]:
        """Of every stage's output."""
        return [stage.layers[-1].layer[-1].convolution.rows for stage in self.backbone.encoder.stages]

    def path_of(self, row: int) -> Path | None:
        return self.shared_path if row == SHARED else self.paths[row]

    def activate(self, row: int, *, frozen: bool = False, views: int = 1) -> "SuperNet":
        """Compute path number `row`, or with SHARED the model of all images, from now on.

        frozen   leave running statistics alone in training.
        views    of every image, side by side in a batch (B views, ..), each normalised for itself in training.
        """
        if not (row == SHARED or 0 <= row < len(self.paths)):
            raise ValueError(f"row: expected 0..{len(self.paths) - 1} or {SHARED} (shared), received {row}")
        self.active.path, self.active.row = self.path_of(row), row
        self.active.frozen, self.active.views = frozen, views
        return self

    def parameters_of(self, row: int) -> set[str]:
        """Names of the parameters that a path computes with."""
        path, names = self.path_of(row), set()
        for name, module in self.named_modules():
            if isinstance(module, SplitConv2d):
                keys = module.keys_of(path)
                names |= {f"{name}.blocks.{key}" for key in keys}
            elif isinstance(module, SplitBatchNorm) and module.affine:
                keys = module.layout.parts() if path is None else module.layout.part(path)
                names |= {f"{name}.{kind}.{key}" for kind in ("scales", "biases") for key in keys}
        return names

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = features(self.backbone, pixel_values)
        return mean_over_groups(found, self.layouts[-1]) if self.active.path is None else found

    @torch.no_grad()
    def extract(self, row: int, *, keep: float = 1.0) -> nn.Module:
        """The plain ResNetModel of a path; every tensor is a copy.

        keep     share of each group's channels that stay; below 1 the model is narrower, and its running statistics
                 have to be measured anew.
        """
        path = self.path_of(row)
        if path is None:
            raise ValueError("row: expected a path, received the full net, which has no plain shape")
        plain = plain_resnet(self.backbone.config, narrow_sizes(self, keep))
        for name, module in self.backbone.named_modules():
            if isinstance(module, SplitConv2d):
                target = plain.get_submodule(name).weight
                target.copy_(module.weight(path)[: target.shape[0], : target.shape[1]])
            elif isinstance(module, SplitBatchNorm):
                norm, size = plain.get_submodule(name), plain.get_submodule(name).num_features
                norm.weight.copy_(module.weight(path)[:size])
                norm.bias.copy_(module.bias(path)[:size])
                for buffer, values in zip((norm.running_mean, norm.running_var), module.statistics(row), strict=True):
                    buffer.copy_(values[:size])
        return plain.eval()


def supernet(backbone: nn.Module, config: Config) -> SuperNet:
    """A super-net of one path, nothing split yet: the function of the ResNetModel that it starts from."""
    paths = ((0,) * len(backbone.encoder.stages),)
    modules = dict(backbone.named_modules())
    source = Source(
        weight=lambda name, path: modules[name].weight,
        bias=lambda name, path: modules[name].bias,
        statistics=lambda name, layout: statistics_of(modules[name], [0]),
        paths=paths,
    )
    return _build(backbone, config, paths, 0, source)


def grow(parent: SuperNet, paths: Sequence[Path], num_split: int) -> SuperNet:
    """A super-net with the last `num_split` stages split; every path computes what its parent path computed.

    Args:
        paths: the digits of all sub-nets, zero at stages that are not split. A path's parent has the same digits, but
            zeros at the stages that are split now; their groups start as copies of the parent's channels.
    """
    config, stages = parent.config, len(parent.layouts)
    if not parent.num_split <= num_split <= stages:
        raise ValueError(f"num_split: expected {parent.num_split}..{stages}, received {num_split}")
    _check_paths(paths, stages, num_split, config.groups)
    shared = _shared_path(config, stages, num_split)
    modules, parents = dict(parent.backbone.named_modules()), parent_rows(parent, paths)

    def before(path: Path) -> Path:
        return _from_stage(path, stages - parent.num_split)

    def statistics(name: str, layout: Layout) -> Statistics:
        found = statistics_of(modules[name], parents)
        if shared is not None or modules[name].layout == layout:
            return found
        full = [spread_over_groups(values[None], layout)[0] for values in found[2:]]
        return found._replace(shared_mean=full[0], shared_variance=full[1])

    source = Source(
        weight=lambda name, path: modules[name].weight(before(path)),
        bias=lambda name, path: modules[name].bias(before(path)),
        statistics=statistics,
        paths=(*paths, *([shared] if shared is not None else [])),
    )
    return _build(parent.backbone, config, tuple(paths), num_split, source)


def parent_rows(parent: SuperNet, paths: Sequence[Path]) -> list[int]:
    """For each path the row of the parent's path that it came from."""
    first = len(parent.layouts) - parent.num_split
    return [parent.paths.index(_from_stage(path, first)) for path in paths]


def statistics_of(norm: nn.Module, rows: Sequence[int]) -> Statistics:
    """Running statistics for new paths: those of the given rows, or a plain norm's for all."""
    if isinstance(norm, SplitBatchNorm):
        chosen = list(rows)
        return Statistics(norm.running_mean[chosen], norm.running_var[chosen], norm.shared_mean, norm.shared_var)
    means, variances = (v.expand(len(rows), -1) for v in (norm.running_mean, norm.running_var))
    return Statistics(means, variances, norm.running_mean, norm.running_var)


def _shared_path(config: Config, stages: int, num_split: int) -> Path | None:
    """The anchor takes the group after the last at every split stage; before any split all is shared."""
    if num_split and config.teacher == "supernet":
        return None
    return (0,) * (stages - num_split) + (config.groups,) * num_split


def _from_stage(path: Path, first: int) -> Path:
    """The path with zeros at the stages before `first`."""
    return (0,) * first + tuple(path[first:])


def _check_paths(paths: Sequence[Path], stages: int, num_split: int, groups: int) -> None:
    if len(set(paths)) != len(paths):
        raise ValueError(f"paths: expected {len(paths)} that differ, received {len(set(paths))}")
    for path in paths:
        limits = [1] * (stages - num_split) + [groups] * num_split
        if len(path) != stages or any(not 0 <= digit < limit for digit, limit in zip(path, limits, strict=True)):
            raise ValueError(f"paths: expected digits below {limits}, received {tuple(path)}")


def _build(like: nn.Module, config: Config, paths: Sequence[Path], num_split: int, source: Source) -> SuperNet:
    """Put split modules at the places of a plain ResNetModel's convolutions and norms."""
    backbone, active = plain_resnet(like.config, like.config.hidden_sizes), Active()
    stages = backbone.encoder.stages

    def layout(channels: int, stage: int) -> Layout:
        if stage < len(stages) - num_split:
            return unsplit(channels, stage)
        groups = max(path[stage] for path in source.paths) + 1
        return Layout(channels, round(config.split_ratio * channels), groups, stage)

    def place(name: str, rows: Layout, columns: Layout) -> None:
        where = f"{name}.convolution"
        conv = backbone.get_submodule(where)
        backbone.set_submodule(where, SplitConv2d(conv, where, rows, columns, source, active))
        where = f"{name}.normalization"
        norm = backbone.get_submodule(where)
        backbone.set_submodule(where, SplitBatchNorm(norm.affine, norm.eps, where, rows, source, active))

    reached = unsplit(like.config.embedding_size)
    place("embedder.embedder", reached, unsplit(like.config.num_channels))
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage.layers):
            name, entered = f"encoder.stages.{s}.layers.{b}", reached
            for i, inner in enumerate(block.layer):
                rows = layout(inner.convolution.out_channels, s)
                place(f"{name}.layer.{i}", rows, reached)
                reached = rows
            if isinstance(block.shortcut, nn.Identity):
                block.shortcut = SplitIdentity(entered, reached, active)
            else:
                place(f"{name}.shortcut", reached, entered)
    return SuperNet(backbone.train(like.training), config, paths, active).activate(SHARED)


def plain_resnet(config: Any, hidden_sizes: Sequence[int]) -> nn.Module:
    """A ResNetModel of this configuration, with other widths where they are given; its weights are to be filled."""
    config = copy.deepcopy(config)
    config.hidden_sizes = list(hidden_sizes)
    with torch.random.fork_rng(devices=[]):
        return transformers().ResNetModel(config)


def narrow_sizes(net: SuperNet, keep: float) -> list[int]:
    """Channels of each stage when each group keeps only its first ones; a first stage without shortcut stays whole."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected above 0 and at most 1, received {keep}")
    sizes = [layout.common + round(keep * layout.individual) for layout in net.layouts]
    if isinstance(net.backbone.encoder.stages[0].layers[0].shortcut, SplitIdentity):
        sizes[0] = net.layouts[0].channels
    return sizes
