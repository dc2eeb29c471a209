# SPDX-License-Identifier: Apache-2.0
"""Signatures of experts: did one mixture learn from another? White box, by who specialises in what and works with whom.

Paper     : arXiv 2510.16968, whose abstract alone was read: every equation here is our reading of it.
Equation  : P_de = share of label d's choices that go to expert e,  C_ij = P(i and j chosen) / P(i or j chosen)
            specialisation = min over one-to-one m of the mean over e, d of |N P_de - N P'_dm(e)| / 2
            collaboration = mean over i < j of |C_ij - C'_m(i)m(j)|, m the matching above
            p = (1 + #{unrelated u: distance(suspect, u) <= distance(suspect, teacher)}) / (1 + U)
Shapes    : D labels, L layers, N experts, R copies of a row, U unrelated models.
Differs   : layers are compared at equal relative depth. Of unequal N: rows are matched as equal masses (each expert as
            so many copies that the numbers agree), and the spectra of C / N stand in for C. Matching also looks at
            sorted rows of C, so that experts of equal specialisation are told apart.
Check     : a copy with its experts in another order has distance 0; continued training is nearer than another seed
            (tests/measure/experts/test_signatures.py).

Both models have to be profiled on the same texts under the same labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.domain_specialisation import load
from anabranch.measure.experts.statistics import ExpertStats, finite

TIE = 1e-3
"""Of collaboration in the cost of a matching: it decides between experts that specialise alike, and no more."""


class Distance(NamedTuple):
    """0: the same habits. Means over layers."""

    specialisation: float
    collaboration: float

    @property
    def total(self) -> float:
        return (self.specialisation + self.collaboration) / 2


@dataclass(frozen=True)
class Verdict:
    """Is the suspect nearer to the teacher than to models that have nothing to do with it?"""

    distance: float
    null: tuple[float, ...]
    """To each unrelated model."""
    p_value: float
    """At least 1 / (1 + U): with fewer than 19 unrelated models it can't fall below .05."""


def specialisation(stats: ExpertStats) -> Tensor:
    """N P (L, N, D): 1 where an expert has its fair share of a label."""
    return load(stats).permute(1, 2, 0) * stats.num_experts


def collaboration(stats: ExpertStats) -> Tensor:
    """C (L, N, N): of the tokens that use one of two experts, the share that uses both; 0 where neither is used."""
    pairs_LNN = finite(stats.pairs, "pairs", "all").sum(0)
    used_LN = pairs_LNN.diagonal(dim1=-2, dim2=-1)
    either_LNN = used_LN[:, :, None] + used_LN[:, None] - pairs_LNN
    return torch.where(either_LNN > 0, pairs_LNN / either_LNN.clamp(min=1), torch.zeros_like(pairs_LNN))


def matching(one: Tensor, other: Tensor, together: Tensor, others_together: Tensor) -> list[tuple[int, int]]:
    """Pairs of experts (N, D) and (M, D) of least cost; each appears as many times as its share of the mass asks.

    together, others_together       C of both, (N, N) and (M, M)
    """
    N, M = len(one), len(other)
    size = math.lcm(N, M)
    cost_NM = torch.cdist(one, other, p=1) / one.shape[1]
    if N == M:
        cost_NM = cost_NM + TIE * torch.cdist(together.sort(-1).values, others_together.sort(-1).values, p=1)
    cost_RR = cost_NM.repeat_interleave(size // N, 0).repeat_interleave(size // M, 1)
    rows, columns = linear_sum_assignment(cost_RR.numpy())
    return [(int(i) // (size // N), int(j) // (size // M)) for i, j in zip(rows, columns, strict=True)]


def layer_distance(one: Tensor, other: Tensor, together: Tensor, others_together: Tensor) -> Distance:
    """Of two layers, as `matching` takes them."""
    pairs = torch.tensor(matching(one, other, together, others_together))
    specialised = float((one[pairs[:, 0]] - other[pairs[:, 1]]).abs().mean() / 2)
    if len(one) != len(other):
        return Distance(specialised, spectral_distance(together, others_together))
    mine_NN, theirs_NN = (C[index][:, index] for C, index in ((together, pairs[:, 0]), (others_together, pairs[:, 1])))
    upper = torch.triu_indices(len(one), len(one), 1)
    return Distance(specialised, float((mine_NN - theirs_NN)[upper[0], upper[1]].abs().mean()))


def spectral_distance(together: Tensor, others_together: Tensor) -> float:
    """Half the sum of |differences| of the sorted eigenvalues of C / N, the shorter spectrum with zeros behind."""
    spectra = torch.zeros(2, max(len(together), len(others_together)), dtype=torch.float64)
    for row, C in zip(spectra, (together, others_together), strict=True):
        row[: len(C)] = torch.linalg.eigvalsh(C.double()).flip(0) / len(C)
    return float((spectra[0] - spectra[1]).abs().sum() / 2)


def distance(one: ExpertStats, other: ExpertStats) -> Distance:
    """Blind to the order of the experts of each model, unless several matchings are equally good."""
    check_labels(one, other)
    signatures = [(specialisation(stats), collaboration(stats)) for stats in (one, other)]
    depths = max(len(one.layers), len(other.layers))
    parts = []
    for i in range(depths):
        layers = [int((i + 0.5) / depths * len(stats.layers)) for stats in (one, other)]
        (P, C), (Q, B) = ((P[layer], C[layer]) for (P, C), layer in zip(signatures, layers, strict=True))
        parts.append(layer_distance(P, Q, C, B))
    means = torch.tensor(parts, dtype=torch.float64).mean(0).tolist()
    return Distance(*means)


def aligned_distance(one: ExpertStats, other: ExpertStats) -> Distance:
    """Of models that started from the same weights: expert e of one is expert e of the other."""
    check_labels(one, other)
    shapes = [(len(stats.layers), stats.num_experts) for stats in (one, other)]
    if shapes[0] != shapes[1]:
        raise UsageError("these models did not start from the same weights", expected=shapes[0], received=shapes[1])
    specialised = float((specialisation(one) - specialisation(other)).abs().mean() / 2)
    upper = torch.triu_indices(one.num_experts, one.num_experts, 1)
    apart_LNN = (collaboration(one) - collaboration(other)).abs()
    return Distance(specialised, float(apart_LNN[:, upper[0], upper[1]].mean()))


def check_labels(one: ExpertStats, other: ExpertStats) -> None:
    if one.labels != other.labels:
        raise UsageError(
            "signatures are compared label by label", expected=list(one.labels), received=list(other.labels),
            hint="profile both models on the same texts",
        )  # fmt: skip


def verdict(
    suspect: ExpertStats, teacher: ExpertStats, unrelated: Sequence[ExpertStats],
    between: Callable[[ExpertStats, ExpertStats], Distance] = distance,
) -> Verdict:  # fmt: skip
    """A p-value against models of the suspect's kind that did not learn from the teacher."""
    if not unrelated:
        raise UsageError("a distance alone says nothing", expected="models that are unrelated", received="none")
    own = between(suspect, teacher).total
    null = tuple(between(suspect, other).total for other in unrelated)
    return Verdict(own, null, (1 + sum(value <= own for value in null)) / (1 + len(null)))
