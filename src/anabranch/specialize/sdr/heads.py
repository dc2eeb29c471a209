# SPDX-License-Identifier: Apache-2.0
"""Projector and predictor of sub-nets, which training alone needs: a pair for every path, or one for all.

Own       : every path has a copy, which parts ways with the others at the split. In one pair for all, the gradients of
            all paths meet, and it asks the sub-nets for embeddings that are laid out alike: 3.2 points less
            (recipes/sdr, five seeds).
Common    : one pair, whose norms have running statistics for each path; for many paths with large heads.
Shapes    : K paths and the shared model: K + 1 heads.
"""

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from anabranch.specialize.sdr.channels import SHARED, Active, Source, SplitBatchNorm, unsplit
from anabranch.specialize.sdr.supernet import NORMS, Path, statistics_of


class OwnHeads(nn.Module):
    """`heads[row]` while that path is active; the last one, `heads[SHARED]`, is the shared model's."""

    def __init__(self, heads: Sequence[nn.Module], active: Active):
        super().__init__()
        self.heads, self.active = nn.ModuleList(heads), active

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.heads[self.active.row](hidden)
        return made


def follow_paths(head: nn.Module, rows: Sequence[int], active: Active, *, own: bool) -> nn.Module:
    """Copies of a head, or of many, for new paths: path k gets what path `rows[k]` had."""
    if not own:
        return norms_by_path(head, rows, active)
    return OwnHeads([norms_by_path(of_row(head, row), [0], active) for row in [*rows, SHARED]], active)


def of_row(head: nn.Module, row: int) -> nn.Module:
    """The head that a path uses."""
    return head.heads[row] if isinstance(head, OwnHeads) else head


def norms_by_path(head: nn.Module, rows: Sequence[int], active: Active) -> nn.Module:
    """A copy of one head, with running statistics for each of these rows."""
    made = copy.deepcopy(head)
    for name, norm in head.named_modules():
        if isinstance(norm, (*NORMS, SplitBatchNorm)):
            layout = unsplit(norm.layout.channels if isinstance(norm, SplitBatchNorm) else norm.num_features)
            source = Source(
                weight=lambda name, path, norm=norm: _plain(norm.weight, path),
                bias=lambda name, path, norm=norm: _plain(norm.bias, path),
                statistics=lambda name, layout, norm=norm: statistics_of(norm, rows),
                paths=((0,),),
            )
            affine = norm.affine
            made.set_submodule(name, SplitBatchNorm(affine, norm.eps, name, layout, source, active))
    return made


def _plain(value: Tensor | Callable[[Path], Tensor], path: Path) -> Tensor:
    return value if isinstance(value, Tensor) else value(path)
