# SPDX-License-Identifier: Apache-2.0
"""ExpertWeave: many expert adapters beside one base, each row of a batch with its own.

Paper     : ExpertWeave (arXiv 2508.17624).
Equation  : a layer holds M base experts and, adapter by adapter, the tuned ones, adapter i's from s_i on;
            P[i][j] = s_i + position of j if adapter i tuned expert j, else j;  selected j -> P[row's adapter][j]
            F = L (M + A E) / sum_l (M + sum_i e_il), E = max e_il: what room for E a block would cost
Shapes    : A adapters, L layers, M base experts, e_il tuned experts of adapter i in layer l, T tokens, K chosen.
Differs   : Blocks lie one behind another without padding, so F is 1 here; it is computed for the comparison.
Check     : every row of a mixed batch equals the same row of the separately merged model up to rounding; a batch of
            base rows is the base bit for bit; F by hand (tests/reuse/serve/test_expert_weave.py).
Exempt    : dtype (an adapter fits the weights of its base bit by bit); experts (adapters name experts by their numbers)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.adapter import ExpertAdapter, check_adapter, fused_of
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import MixtureLayer, Triple, open_layers
from anabranch.models.mixtures.routing import changed
from anabranch.models.mixtures.surgery import append_experts

BASE = -1


class Memory(NamedTuple):
    """Experts to be held, over all layers."""

    ragged: int
    """As here: L M + sum e_il."""
    padded: int
    """With blocks of equal size: L (M + A E)."""
    separate: int
    """As merged models of their own, the base included: (A + 1) L M."""

    @property
    def fragmentation(self) -> float:
        return self.padded / self.ragged


def memory(num_experts: int, tuned: Sequence[Sequence[int]]) -> Memory:
    """
    num_experts     M
    tuned           (A, L), how many experts each adapter tuned in each layer
    """
    num_layers = len(tuned[0])
    most = max(count for own in tuned for count in own)
    ragged = num_layers * num_experts + sum(sum(own) for own in tuned)
    padded = num_layers * (num_experts + len(tuned) * most)
    return Memory(ragged, padded, (len(tuned) + 1) * num_layers * num_experts)


class ExpertWeave:
    """In the model until `remove`; a forward pass outside `serving` is the base's.

        weave = ExpertWeave(model, [law, code])
        with weave.serving([0, -1, 1]):         # the first row with law, the second with the base, the third with code
            model(...)
        weave.remove()

    Routers know nothing of the new experts, so adapters that changed a router or anything but experts are refused.

    Raises:
        UsageError: nothing was changed: no adapter, one of another base, or one that changed more than experts.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[ExpertAdapter]):
        self.layers = open_layers(model)
        self.adapters = tuple(adapters)
        check_adapters(model, self.adapters)
        self.num_experts = {layer.name: layer.num_experts for layer in self.layers}
        self.places = {layer.name: self.weave(layer) for layer in self.layers}

    def weave(self, layer: MixtureLayer) -> Tensor:
        """Appends all adapters' experts at once; P (A + 1, M), whose last row is the base's: where -1 points."""
        tuned = [adapter.experts.get(layer.name, ()) for adapter in self.adapters]
        P_AM = torch.arange(layer.num_experts).repeat(len(tuned) + 1, 1)
        start = layer.num_experts
        for i, own in enumerate(tuned):
            P_AM[i, list(own)] = torch.arange(start, start + len(own))
            start += len(own)
        if any(tuned):
            parts = {
                name.rpartition(".")[2]: torch.cat([a.tensors[name] for a in self.adapters if name in a.tensors])
                for name in fused_of(layer)
            }
            append_experts(layer, parts)
        return P_AM

    @property
    def memory(self) -> Memory:
        tuned = [[len(adapter.experts.get(layer.name, ())) for layer in self.layers] for adapter in self.adapters]
        return memory(self.num_experts[self.layers[0].name], tuned)

    @contextmanager
    def serving(self, rows: Sequence[int]) -> Iterator[None]:
        """Around forward passes over batches of `len(rows)` rows, of one token or many.

        rows    the index of each row's adapter, -1 for the base
        """
        if not rows or not all(BASE <= row < len(self.adapters) for row in rows):
            raise UsageError(
                "there is no such adapter", expected=f"-1 (the base) to {len(self.adapters) - 1} for every row",
                received=list(rows),
            )  # fmt: skip
        ids_B = torch.tensor(list(rows))

        def remap(layer: MixtureLayer, triple: Triple) -> Triple:
            selected_TK = triple.selected_experts
            ids_T = ids_of_tokens(ids_B, len(selected_TK)).to(selected_TK.device)
            P_AM = self.places[layer.name].to(selected_TK.device)
            return triple._replace(selected_experts=P_AM[ids_T[:, None], selected_TK])

        with changed(self.layers, remap):
            yield

    @torch.no_grad()
    def remove(self) -> None:
        """The base again, bit for bit."""
        for layer in self.layers:
            before = self.num_experts[layer.name]
            for name, value in fused_of(layer).items() if layer.num_experts > before else ():
                own = nn.Parameter(value[:before].clone(), value.requires_grad)
                setattr(layer.experts, name.rpartition(".")[2], own)
            layer.experts.num_experts = before  # type: ignore[assignment]


def ids_of_tokens(ids_B: Tensor, num_tokens: int) -> Tensor:
    if num_tokens % len(ids_B):
        raise UsageError(
            "the batch has another number of rows than adapters were named for",
            expected=f"{len(ids_B)} rows of equal length", received=f"{num_tokens} tokens",
        )  # fmt: skip
    return ids_B.repeat_interleave(num_tokens // len(ids_B))


def check_adapters(model: nn.Module, adapters: Sequence[ExpertAdapter]) -> None:
    if not adapters:
        raise UsageError("nothing to serve beside the base", expected="at least one adapter", received="none")
    base = fingerprint(model)
    for i, adapter in enumerate(adapters):
        check_adapter(model, adapter, base=base)
        if adapter.whole:
            raise UsageError(
                f"adapter {i} changed more than routed experts: it can't be served beside others",
                expected="routers and everything else as in the base",
                received=", ".join(sorted(adapter.whole)[:3]), hint="merge it into a model of its own",
            )  # fmt: skip
