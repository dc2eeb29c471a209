# SPDX-License-Identifier: Apache-2.0
"""Does what one reasoning step learns help or hurt the others? Cosines of their gradients, and one step's transfer.

Paper     : MoTE (ACL 2025, arXiv 2405.00557) names the conflict; the measure is after Yu et al. 2020 (arXiv 2001.06782)
            and Fifty et al. 2021 (arXiv 2109.04617), inter-task affinity.
Equation  : cos(s, t) = <g_s, g_t> / (|g_s| |g_t|),  g_s the gradient of the mean loss of step s's tokens;
            gain(s, t) = 1 - L_t(theta - rate g_s / |g_s|) / L_t(theta)
Shapes    : S steps; both results (S, S), rows the step that is learnt from.
Differs   : the step along a gradient has one length for all steps, so that rows can be compared. The cosine is positive
            early in training even where steps conflict later: read the gains, and at the end of training.
Check     : for a small rate a gain is rate <g_s, g_t> / (|g_s| L_t); weights come back bit for bit
            (tests/specialize/mote/test_interference.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.measure.conflict import gradient, gradient_conflict
from anabranch.specialize.mote.collate import IGNORED
from anabranch.specialize.mote.mote import MoTE

Batch = Mapping[str, Tensor]


def step_loss(mote: MoTE, batch: Batch, step: int) -> Tensor:
    """Mean loss of the tokens of one step.

    Raises:
        UsageError: the batch has no token of it.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    chosen = (batch["labels"][:, 1:] != IGNORED) & (batch["step_ids"][:, 1:] == step)
    if not chosen.any():
        name = mote.settings.steps.names[step]
        raise UsageError(f"no chain of the batch has the step {name!r}", expected="every step in every batch")
    logits = mote(**inputs).logits[:, :-1][chosen].float()
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:][chosen])


def step_conflict(mote: MoTE, halves: Sequence[Batch]) -> Tensor:
    """(S, S) cosines on two disjoint batches; the diagonal is one batch against the other, the ceiling of noise."""
    losses = [lambda half, step=step: step_loss(mote, halves[half], step) for step in range(len(mote.settings.steps))]
    return gradient_conflict(mote, losses)


def step_transfer(mote: MoTE, learnt: Batch, asked: Batch, *, rate: float = 0.1) -> Tensor:
    """(S, S) gains on the batch `asked` of a step of length `rate` along each step's gradient on the batch `learnt`.

    The mixture is as before when this returns.
    """
    parameters = list(mote.trained().values())
    if not parameters:
        raise UsageError("nothing of this mixture can be trained", hint="load(..., trainable=True)")
    steps = range(len(mote.settings.steps))
    before = [float(step_loss(mote, asked, step).detach()) for step in steps]
    kept = [parameter.detach().clone() for parameter in parameters]
    gains = torch.zeros(len(steps), len(steps))
    for step in steps:
        direction = gradient(step_loss(mote, learnt, step), parameters)
        direction = direction / direction.norm().clamp(min=1e-12)
        try:
            with torch.no_grad():
                parts = direction.split([parameter.numel() for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.sub_(rate * part.view_as(parameter).to(parameter))
                after = [float(step_loss(mote, asked, other)) for other in steps]
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        gains[step] = torch.tensor([1 - now / then for now, then in zip(after, before, strict=True)])
    return gains
