# SPDX-License-Identifier: Apache-2.0
"""Linear layers of many experts over rows that are sorted by expert.

Equation  : y_t = W_e x_t + b_e for the expert e whose group row t is in.
Shapes    : T rows, I and O features, G groups (one expert each).
Differs   : nothing; `torch.autograd` through a loop of `nn.functional.linear` gives the same numbers.
Why       : a loop of small matrix products waits for all threads after each one. Experts whose weights lie one after
            another in memory (see `ExpertBank.pack`) and whose groups have equal sizes go through one batched product.
            Weight gradients stay one tensor an expert: an expert that received no row gets no gradient at all, and
            optimisers skip it. (A stacked gradient writes zeros for all; keeping gradient buffers gained nothing.)
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(rows: Tensor, sizes: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """(T, O): the first sizes[0] rows through weights[0] and biases[0], the next sizes[1] through the second, ..."""
    apply = cast(Callable[..., Tensor], GroupedLinear.apply)
    return apply(rows.contiguous(), tuple(sizes), *weights, *biases)


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, sizes: tuple[int, ...], *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(sizes)], parameters[len(sizes) :]
        ctx.sizes, ctx.runs = sizes, runs(sizes, weights)
        ctx.save_for_backward(x_TI, *weights)
        y_TO = x_TI.new_empty(len(x_TI), len(weights[0]))
        for run, start, stop in ctx.runs:
            w_ROI, b_R1O = adjacent(weights[run]), torch.stack(biases[run])[:, None]
            x_RMI, y_RMO = blocks(x_TI[start:stop], len(w_ROI)), blocks(y_TO[start:stop], len(w_ROI))
            torch.baddbmm(b_R1O, x_RMI, w_ROI.transpose(1, 2), out=y_RMO)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *weights = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad
        dy_TO, dx_TI = dy_TO.contiguous(), torch.empty_like(x_TI)
        for run, start, stop in ctx.runs if need_x else ():
            w_ROI = adjacent(weights[run])
            torch.bmm(blocks(dy_TO[start:stop], len(w_ROI)), w_ROI, out=blocks(dx_TI[start:stop], len(w_ROI)))
        groups = list(zip(torch.split(dy_TO, ctx.sizes), torch.split(x_TI, ctx.sizes), strict=True))
        dw = [dy.T @ x if wanted else None for (dy, x), wanted in zip(groups, need[: len(groups)], strict=True)]
        db = [dy.sum(0) if wanted else None for (dy, _), wanted in zip(groups, need[len(groups) :], strict=True)]
        return dx_TI if need_x else None, None, *dw, *db


def blocks(rows_TF: Tensor, num_blocks: int) -> Tensor:
    return rows_TF.view(num_blocks, -1, rows_TF.shape[1])


def runs(sizes: Sequence[int], weights: Sequence[Tensor]) -> list[tuple[slice, int, int]]:
    """Longest stretches of groups of one size whose weights are neighbours in memory, with their first and last row."""
    ends = list(accumulate(sizes))
    found, first = [], 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] != sizes[first] or not neighbours(weights[i - 1], weights[i]):
            found.append((slice(first, i), ends[first] - sizes[first], ends[i - 1]))
            first = i
    return found


def neighbours(left: Tensor, right: Tensor) -> bool:
    """Whether `right` begins where `left` ends, in the same allocation."""
    return (
        left.shape == right.shape
        and left.is_contiguous()
        and right.is_contiguous()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != 0
        and right.storage_offset() == left.storage_offset() + left.numel()
    )


def adjacent(weights: Sequence[Tensor]) -> Tensor:
    """(R, O, I): neighbours as one tensor, without a copy."""
    first = weights[0]
    return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
