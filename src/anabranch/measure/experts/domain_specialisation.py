# SPDX-License-Identifier: Apache-2.0
"""Domain specialisation: how differently the labels of a stream load the experts, against what chance would give.

Paper     : none; the common ground of studies of expert specialisation. The correction is Miller 1955.
Equation  : f_de = c_de / (K T_d),  spec_e = max_d f_de / sum_d f_de,  H_d = -sum_e f_de log f_de / log N
            JS(d, d') = H((f_d + f_d') / 2) - (H(f_d) + H(f_d')) / 2, nats;  J = |A and B| / |A or B|, n most used
            I = sum_de p log(p / (p_d p_e)) - (D - 1)(N - 1) / (2 C),  normalised I / H(label),  P(j | i) = c_ij / c_i
Shapes    : D labels, F folds, L layers, N experts, K chosen per token, C choices, R permutations.
Differs   : the null shuffles the labels of whole folds of documents, as tokens of a document are no independent draws.
Check     : disjoint routing gives log 2 and H(label); independent routing stays within the null; slow loops
            (tests/measure/experts/test_domain_specialisation.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.statistics import ExpertStats


@dataclass(frozen=True, eq=False)
class Information:
    """What the choice of an expert says about the label, by layer, in nats."""

    plug_in: Tensor  # (L,), never below zero and biased upwards
    corrected: Tensor  # (L,)
    normalised: Tensor
    """(L,), the corrected over the entropy of the label: 1 where an expert tells the label."""
    null: Tensor  # (R, L), plug-in values with shuffled labels
    p_value: Tensor  # (L,), at least 1 / (R + 1)


def load(stats: ExpertStats) -> Tensor:
    """f (D, L, N): share of a label's choices that went to each expert."""
    if empty := [name for name in stats.labels if not stats.num_tokens(name)]:
        raise UsageError("a label without tokens loads no expert", expected="tokens of every label", received=empty)
    counts_DLN = stats["count"].sum(1)
    return counts_DLN / counts_DLN.sum(-1, keepdim=True)


def specialisation(stats: ExpertStats) -> Tensor:
    """spec (L, N): 1 for an expert of one label, 1 / D for everybody's; NaN for an unused one."""
    load_DLN = load(stats)
    return load_DLN.amax(0) / load_DLN.sum(0)


def load_entropy(stats: ExpertStats) -> Tensor:
    """H (D, L): 1 where a label uses all experts alike, 0 where it uses one."""
    return entropy(load(stats)) / math.log(stats.num_experts)


def divergence(stats: ExpertStats) -> Tensor:
    """JS (D, D, L): 0 for equal loads, log 2 where two labels share no expert."""
    load_DLN = load(stats)
    middle_DDLN = (load_DLN[:, None] + load_DLN[None]) / 2
    entropy_DL = entropy(load_DLN)
    return (entropy(middle_DDLN) - (entropy_DL[:, None] + entropy_DL[None]) / 2).clamp(min=0)


def overlap(stats: ExpertStats, num_top: int) -> Tensor:
    """J (D, D, L): Jaccard index of the labels' `num_top` most used experts."""
    if not 1 <= num_top <= stats.num_experts:
        raise UsageError("no such number of experts", expected=f"1 to {stats.num_experts}", received=num_top)
    load_DLN = load(stats)
    top_DLn = load_DLN.sort(dim=-1, descending=True, stable=True).indices[..., :num_top]
    top_DLN = torch.zeros_like(load_DLN, dtype=torch.bool).scatter_(-1, top_DLn, True)
    either, both = top_DLN[:, None] | top_DLN[None], top_DLN[:, None] & top_DLN[None]
    return both.sum(-1) / either.sum(-1)


def co_activation(stats: ExpertStats, label: str) -> Tensor:
    """P(j | i) (L, N, N): of the tokens that use expert i, the share that uses j too; NaN for an unused one."""
    pairs_LNN = stats.pairs[stats.index(label)]
    return pairs_LNN / pairs_LNN.diagonal(dim1=-2, dim2=-1)[..., None]


def information(
    stats: ExpertStats, *, num_permutations: int = 1000, generator: torch.Generator | None = None
) -> Information:
    """Mutual information of label and chosen expert, against a null of shuffled folds."""
    D, F = stats.tokens.shape
    counts_DFLN = stats["count"]
    plug_in_L, choices = mutual_information(counts_DFLN.sum(1)), counts_DFLN.sum((0, 1, 3))
    used = (counts_DFLN.sum((0, 1)) > 0).sum(-1), (counts_DFLN.sum((1, 3)) > 0).sum(0)
    corrected_L = plug_in_L - (used[1] - 1) * (used[0] - 1) / (2 * choices)
    label_L = entropy((counts_DFLN.sum((1, 3)) / choices).T)
    generator, units = generator or torch.Generator().manual_seed(0), counts_DFLN.flatten(0, 1)
    orders = [torch.randperm(D * F, generator=generator) for _ in range(num_permutations)]
    null_RL = torch.stack([mutual_information(units[order].view(counts_DFLN.shape).sum(1)) for order in orders])
    as_high_L = (null_RL >= plug_in_L - 1e-12).sum(0)
    return Information(
        plug_in_L, corrected_L, corrected_L / label_L, null_RL, (1 + as_high_L) / (1.0 + num_permutations)
    )


def interval(
    stats: ExpertStats, measure: Callable[[ExpertStats], Tensor], *, num_resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """95 % limits of a measure, in its shape, from drawing the folds of documents again."""
    generator = generator or torch.Generator().manual_seed(0)
    draws_SF = torch.randint(stats.num_folds, (num_resamples, stats.num_folds), generator=generator)
    values = torch.stack([measure(stats.resampled(folds)) for folds in draws_SF.tolist()])
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return low, high


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, 0 log 0 = 0."""
    terms: Tensor = torch.special.xlogy(probabilities, probabilities)
    return -terms.sum(-1)


def mutual_information(counts_DLN: Tensor) -> Tensor:
    """I (L,) of the table of labels and experts, as it stands."""
    joint_LDN = counts_DLN.movedim(0, 1) / counts_DLN.sum((0, 2))[:, None, None]
    return (entropy(joint_LDN.sum(2)) + entropy(joint_LDN.sum(1)) - entropy(joint_LDN.flatten(1))).clamp(min=0)
