# SPDX-License-Identifier: Apache-2.0
"""MC-SMoE: seldom used experts join the often used one that the router treats most alike, and are mixed aligned.

Paper     : Li et al. 2024 (arXiv 2310.01334, ICLR 2024).
Equation  : P_i = argmax_P <W_dom, P W_i>, summed over gate and up rows, gate and up biases, down columns
            dominant: the most used of each layer and the most used of the model besides, `num_dominant` in all
            group of i = argmax over dominant d of (1 + cos(z_.i, z_.d)) / 2,  z the router's logits over tokens
            W = sum_i f_i W_i / sum_i f_i over the group;  the router is left as it is
Shapes    : L layers, N experts, T tokens, D width, M width of an expert.
Differs   : a protected expert stays on its own. Low rank and sparse rows are in low_rank.py and need no training;
            a loss to train the merged model with is `distillation`.
Check     : alignment leaves an expert's function alone; permuted copies merge without loss when aligned, and with loss
            when not (tests/reuse/merge/test_mc_smoe.py).
Exempt    : experts (a group bears the number of its dominant expert); dtype (which experts join is parted by the
            rounding of the model)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import Expert, ExpertBank
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.reuse.calibration import Batch, captured
from anabranch.reuse.merge.tie import Labels, tie
from anabranch.reuse.prune.keep import Protect, check_scores, protected, ranked

TEMPERATURE = 2.0
DISTILLATION_COEF = 0.2


@dataclass(frozen=True, eq=False)
class Merged:
    labels: Labels
    """By name of the layer, the dominant expert that each expert stands on."""
    usage: Tensor  # (L, N)


def unit_order(reference: Expert, other: Expert) -> Tensor:
    """(M,) int64: the hidden unit of `other` for each one of `reference`, by the inner product of their weights."""
    from scipy.optimize import linear_sum_assignment

    similarity_MM = reference.down.double().T @ other.down.double()
    for name in ("gate", "up", "gate_bias", "up_bias"):
        mine, theirs = getattr(reference, name), getattr(other, name)
        if mine is not None:
            similarity_MM += mine.double().view(len(mine), -1) @ theirs.double().view(len(theirs), -1).T
    return torch.as_tensor(linear_sum_assignment(similarity_MM.cpu().numpy(), maximize=True)[1])


@torch.no_grad()
def reorder(expert: Expert, order: Tensor) -> None:
    """Hidden units in another order, in place: the expert computes the same."""
    for name, value in expert.tensors().items():
        if name == "down":
            value.copy_(value[:, order])
        elif name != "down_bias":
            value.copy_(value[order])


def align(layer: MixtureLayer, labels: Sequence[int]) -> None:
    """Every member's hidden units in the order of its dominant expert's."""
    bank = ExpertBank(layer)
    for expert, dominant in enumerate(labels):
        if expert != dominant:
            reorder(bank[expert], unit_order(bank[dominant], bank[expert]))


def dominant_experts(
    layers: Sequence[MixtureLayer], usage: Tensor, num_dominant: int, protect: Protect = ()
) -> list[list[int]]:
    """By layer: its most used and its protected experts, then the most used of the whole model up to `num_dominant`."""
    check_scores(layers, usage)
    held = protected(layers, protect)
    everyone = range(layers[0].num_experts)
    chosen = []
    for layer, row in zip(layers, usage.double(), strict=True):
        free = [e for e in ranked(row, everyone) if e not in held[layer.name]]
        chosen.append(held[layer.name] | set(free[:1]))  # others may join only one that is not protected
    least, most = sum(map(len, chosen)), usage.numel()
    if not least <= num_dominant <= most:
        raise UsageError(
            "so many experts can't be left", expected=f"{least} to {most} in all layers", received=num_dominant
        )
    rest = [(-float(usage[i, e]), i, e) for i in range(len(layers)) for e in everyone if e not in chosen[i]]
    for _, i, expert in sorted(rest)[: num_dominant - least]:
        chosen[i].add(expert)
    return [sorted(own) for own in chosen]


def similarity(router_logits: Tensor) -> Tensor:
    """(N, N), (1 + cos) / 2 of the logits' columns over tokens."""
    if not bool(router_logits.isfinite().all()):  # the nearest of them would be a group all the same
        raise UsageError("router logits are no numbers", expected="a model whose outputs are finite", received="NaN")
    columns_NT = torch.nn.functional.normalize(router_logits.double(), dim=0).T
    return (1 + columns_NT @ columns_NT.T) / 2


def grouped(similarity_NN: Tensor, dominant: Sequence[int], alone: set[int]) -> list[int]:
    """The dominant expert that each expert joins; nobody joins one of `alone`."""
    open_to_all = [expert for expert in dominant if expert not in alone]
    nearest = [open_to_all[int(row.argmax())] for row in similarity_NN[:, open_to_all]] if open_to_all else []
    return [e if e in dominant else nearest[e] for e in range(len(similarity_NN))]


@torch.no_grad()
def merge(model: Any, batches: Iterable[Batch], num_dominant: int, protect: Protect = ()) -> Merged:
    """In place: aligned, merged and tied by copying, so the checkpoint is a stock one of the same configuration."""
    layers = open_layers(model)
    if bad := [a.name for a in layers if not all(bool(p.isfinite().all()) for p in a.experts.parameters())]:
        raise UsageError("experts hold NaN or infinity", expected="finite weights", received=bad[0])
    seen = captured(model, layers, batches)
    usage = torch.stack([seen[layer.name].usage(layer.num_experts) for layer in layers]).cpu()
    held, labels = protected(layers, protect), {}
    for layer, dominant in zip(layers, dominant_experts(layers, usage, num_dominant, protect), strict=True):
        labels[layer.name] = grouped(similarity(seen[layer.name].router_logits), dominant, held[layer.name])
    for layer, row in zip(layers, usage, strict=True):
        align(layer, labels[layer.name])
        tie(layer, labels[layer.name], row)
    return Merged(labels, usage)


def distillation(loss: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """loss + 0.2 T^2 KL(teacher || student) at T = 2, over the last dimension, a mean over the others."""
    student, teacher = (logits.float().div(TEMPERATURE).log_softmax(-1) for logits in (student_logits, teacher_logits))
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    return loss + DISTILLATION_COEF * TEMPERATURE**2 * divergence
