# SPDX-License-Identifier: Apache-2.0
"""Sub-MoE: experts whose outputs point the same way are averaged by usage and projected on their shared subspace.

Paper     : arXiv 2506.23266, adaptive clustering and subspace merging.
Equation  : s_ij = mean_t cos(E_i(x_t), E_j(x_t));  C clusters by K-means on the outputs, each divided by its norm
            [W_1 ... W_n] = U S [V_1 ... V_n]^T;  W = U_r S_r (sum f_i V_i / sum f)^T = U_r U_r^T sum f_i W_i / sum f
Shapes    : T calibration tokens, N experts, C clusters of a layer, r rank, D width, M width of an expert.
Differs   : the last equality is what is computed: without truncation the method IS the mean weighted by usage, as
            U S V_i^T = W_i. Only clusters, rank and whitening can tell the two apart. Whitening takes U_r from
            [W_1 X ... W_n X] with X X^T the second moment of the matrix's inputs over all tokens of the group.
            Budgets of neighbouring layers, which the paper chooses together, are split by the least spread.
Check     : rank M or more equals the weighted mean; a projection twice is a projection once; C = N changes nothing
            (tests/reuse/merge/test_sub_moe.py).
Exempt    : experts (groups are numbered, and seeded by the place of an expert); dtype (which experts join is parted by
            the rounding of the model)

K-means needs distances alone, and |u_i - u_j|^2 = 2 T (1 - s_ij): it runs on a root of s, N numbers an expert.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.reuse.calibration import Batch, captured
from anabranch.reuse.merge.tie import Labels, tie, weighted_mean
from anabranch.reuse.prune.keep import Protect, protected

RESTARTS = 10
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Merged:
    labels: Labels
    similarity: dict[str, Tensor]
    """By name of the layer, (N, N)."""


def similarity(layer: MixtureLayer, hidden_states: Tensor) -> Tensor:
    """s_ij = mean_t cos(E_i(x_t), E_j(x_t)), (N, N) float64, over all tokens whether routed there or not."""
    bank = ExpertBank(layer)
    sums_NN = torch.zeros(len(bank), len(bank), dtype=torch.float64, device=hidden_states.device)
    for part_TD in torch.split(hidden_states, CHUNK):
        outputs_TND = torch.stack([bank.run(e, part_TD) for e in range(len(bank))], 1).double()
        units_TND = torch.nn.functional.normalize(outputs_TND, dim=-1)
        sums_NN += torch.einsum("tid,tjd->ij", units_TND, units_TND)
    return (sums_NN / len(hidden_states)).cpu()


def clusters(similarity_NN: Tensor, num_clusters: int, seed: int = 0) -> tuple[list[int], float]:
    """(N,) labels, and the spread: the sum of squared distances to the means over T. No cluster is empty."""
    from sklearn.cluster import KMeans

    if not 1 <= num_clusters <= len(similarity_NN):
        raise UsageError("so many clusters can't be", expected=f"1 to {len(similarity_NN)}", received=num_clusters)
    if num_clusters == len(similarity_NN):
        return list(range(num_clusters)), 0.0
    values, vectors = torch.linalg.eigh(similarity_NN)
    root_NN = vectors * values.clamp(min=0).sqrt()  # rows are as far apart as the outputs
    fitted = KMeans(num_clusters, n_init=RESTARTS, random_state=seed).fit(root_NN.numpy())
    return fitted.labels_.tolist(), float(fitted.inertia_)


def budgets(similarities: Sequence[Tensor], counts: Sequence[int], seed: int = 0) -> list[int]:
    """Clusters of each layer: neighbours in pairs share the sum of their counts as spreads least, else evenly."""
    found = list(counts)
    for i in range(0, len(similarities) - 1, 2):
        sizes, total = [len(similarities[i]), len(similarities[i + 1])], counts[i] + counts[i + 1]
        splits = [(c, total - c) for c in range(1, sizes[0] + 1) if 1 <= total - c <= sizes[1]]
        spread = {s: sum(clusters(similarities[i + j], c, seed)[1] for j, c in enumerate(s)) for s in splits}
        nearest = sorted(splits, key=lambda split: abs(split[0] - counts[i]))
        found[i], found[i + 1] = min(nearest, key=lambda split: round(spread[split], 9))
    return found


def left_basis(matrices: Sequence[Tensor], rank: int, moments: Sequence[Tensor] | None = None) -> Tensor:
    """U_r (O, r) of [W_1 X_1 ... W_n X_n], from sum_i W_i X_i X_i^T W_i^T; X the identity without `moments`."""
    parts = [w.double() for w in matrices]
    products = [w @ w.T if moments is None else w @ moments[i] @ w.T for i, w in enumerate(parts)]
    vectors: Tensor = torch.linalg.eigh(torch.stack(products).sum(0)).eigenvectors
    return vectors[:, -rank:]


def input_moments(bank: ExpertBank, expert: int, hidden_states: Tensor) -> dict[str, Tensor]:
    """X X^T of what each matrix of an expert takes in."""
    own = bank[expert]
    gate_TM = torch.nn.functional.linear(hidden_states, own.gate, own.gate_bias)
    up_TM = torch.nn.functional.linear(hidden_states, own.up, own.up_bias)
    inner_TM, x_TD = bank.activate(gate_TM, up_TM).double(), hidden_states.double()
    return {"gate": x_TD.T @ x_TD, "up": x_TD.T @ x_TD, "down": inner_TM.T @ inner_TM}


def merged(
    bank: ExpertBank, group: Sequence[int], usage: Tensor, rank: int | None = None, hidden_states: Tensor | None = None
) -> dict[str, Tensor]:
    """U_r U_r^T sum_i f_i W_i / sum f of every matrix; biases are averaged. Hidden states: whitened by them."""
    made = weighted_mean(bank, group, usage)
    if rank is None:
        return made
    moments = [input_moments(bank, e, hidden_states) for e in group] if hidden_states is not None else None
    for name in ("gate", "up", "down"):
        if rank < len(made[name]):
            own = None if moments is None else [moment[name] for moment in moments]
            basis = left_basis([getattr(bank[e], name) for e in group], rank, own)
            made[name] = basis @ (basis.T @ made[name])
    return made


@torch.no_grad()
def merge(
    model: Any, batches: Iterable[Batch], num_clusters: int, *, rank: int | None = None, whiten: bool = False,
    joint: bool = False, protect: Protect = (), seed: int = 0,
) -> Merged:  # fmt: skip
    """In place and tied by copying: a stock checkpoint of the same configuration.

    num_clusters    weights that are left of each layer; on average, where neighbours choose together (`joint`)
    rank            of the subspace; None: the weighted mean as it is
    protect         experts that stay on their own; they count as clusters
    """
    layers = open_layers(model)
    held = protected(layers, protect)
    check(layers, num_clusters, rank, held)
    seen = captured(model, layers, batches)
    alike = {layer.name: similarity(layer, seen[layer.name].hidden_states) for layer in layers}
    free = {name: [e for e in range(len(s)) if e not in held[name]] for name, s in alike.items()}
    among = [alike[name][own][:, own] for name, own in free.items()]
    counts = [num_clusters - len(held[layer.name]) for layer in layers]
    labels = {}
    for layer, s, count in zip(layers, among, budgets(among, counts, seed) if joint else counts, strict=True):
        found = dict(zip(free[layer.name], clusters(s, count, seed)[0], strict=True))
        labels[layer.name] = [found.get(e, layer.num_experts + e) for e in range(layer.num_experts)]
    for layer in layers:
        own = seen[layer.name]
        make = partial(merged, rank=rank, hidden_states=own.hidden_states if whiten else None)
        tie(layer, labels[layer.name], own.usage(layer.num_experts).cpu(), make)
    return Merged(labels, alike)


def check(layers: Sequence[MixtureLayer], num_clusters: int, rank: int | None, held: Mapping[str, set[int]]) -> None:
    if rank is not None and rank < 1:
        raise UsageError("a subspace has a dimension", expected="rank >= 1", received=rank)
    least, most = 1 + max(map(len, held.values())), layers[0].num_experts
    if not least <= num_clusters <= most:
        raise UsageError(
            "so many clusters can't be", expected=f"{least} to {most}, protected experts among them",
            received=num_clusters,
        )  # fmt: skip
