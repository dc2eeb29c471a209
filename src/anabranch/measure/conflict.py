# SPDX-License-Identifier: Apache-2.0
"""Do the sources pull the shared model in different directions? Cosines between their gradients.

Paper     : Yu et al. 2020, "Gradient Surgery" (arXiv 2001.06782), definition 1: a conflict is a negative cosine.
Equation  : g_i = gradient of the training loss on images of source i;  cos(i, j) = <g_i, g_j> / (|g_i| |g_j|).
Shapes    : m sources; the result is (m, m), its diagonal the cosine between two disjoint batches of one source.
Differs   : the diagonal is not 1 but the noise ceiling: a pair conflicts in so far as it lies below both its diagonals.
Check     : opposite losses give -1, one loss gives its ceiling (tests/measure/test_conflict.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient as one fp32 vector; parameters that the loss does not reach count as zero."""
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().float() for p, g in zip(parameters, grads, strict=True)]
    )


def gradient_conflict(model: nn.Module, losses: Sequence[Callable[[int], Tensor]]) -> Tensor:
    """Cosines between the sources' gradients at the model's weights, which stay as they are.

    Args:
        losses: for each source a function of 0 or 1 that gives its loss on the first or the second of two disjoint
            batches.

    Returns:
        (m, m) cosines, off-diagonal averaged over the two batches; the diagonal is batch 0 against batch 1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.stack([gradient(loss(half), parameters) for loss in losses]) for half in (0, 1)]
    first, second = (nn.functional.normalize(g, dim=1) for g in grads)
    within = (first @ first.T + second @ second.T) / 2
    within = (within + within.T) / 2  # some processors round the two triangles of a product apart
    return within.diagonal_scatter((first * second).sum(1))
