# SPDX-License-Identifier: Apache-2.0
"""Drawn statistics, traces and small mixtures for the contract, each with its experts or documents in another order."""

from dataclasses import replace

import torch

from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.measure.experts.trace import RoutingTrace
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.surgery import permute_experts
from anabranch.testing import Reordering

LABELS, FOLDS, LAYERS, EXPERTS, TOP_K = ("one", "other", "third"), 3, 2, 5, 2
DOCUMENTS, LENGTH = 4, 8


def stats(g: torch.Generator, **more: str) -> ExpertStats:
    """Of drawn routing: every label prefers other experts. `more` names further sums of positive numbers."""
    shape, tokens = (len(LABELS), FOLDS, LAYERS), 6
    logits = torch.randn(*shape, tokens, EXPERTS, generator=g) + 2 * torch.randn(3, 1, LAYERS, 1, EXPERTS, generator=g)
    selected = torch.zeros_like(logits).scatter(-1, logits.topk(TOP_K).indices, 1.0)
    weights = logits.softmax(-1) * selected
    outputs = torch.rand(logits.shape, generator=g)
    sums = {
        "count": selected, "weight": weights, "weight_square": weights.square(), "logit": logits,
        "share": weights / weights.sum(-1, keepdim=True), "logit_square": logits.square(),
        "probability": logits.softmax(-1), "document_rate": selected / tokens, "norm": selected * outputs,
        "weighted_norm": weights * outputs, "share_norm": weights * outputs, "turn": weights * outputs / 2,
    }  # fmt: skip
    held = {name: value.double().sum(-2) for name, value in sums.items()}
    held["peak"] = (selected * outputs).double().amax(-2)
    held |= {name: torch.rand(*shape, EXPERTS, generator=g).double() for name in more}
    pairs = torch.einsum("dflti,dfltj->dlij", selected, selected).double()
    counted = torch.full((len(LABELS), FOLDS), float(tokens)).double()
    layers = tuple(f"layer {i}" for i in range(LAYERS))
    return ExpertStats(LABELS, layers, EXPERTS, TOP_K, FOLDS, "", held, counted, counted / 2, pairs)


def stats_of_experts(value: ExpertStats, order: list[int]) -> ExpertStats:
    sums = {name: of[..., order] for name, of in value.sums.items()}
    return replace(value, sums=sums, pairs=value.pairs[..., order, :][..., order])


def stats_of_folds(value: ExpertStats, order: list[int]) -> ExpertStats:
    sums = {name: of[:, order] for name, of in value.sums.items()}
    return replace(value, sums=sums, tokens=value.tokens[:, order], documents=value.documents[:, order])


def trace(g: torch.Generator, documents: int = 5, length: int = 12) -> RoutingTrace:
    """Neighbours prefer the same experts."""
    wishes = torch.randn(documents, 1, LAYERS, EXPERTS, generator=g) * 2
    wishes = wishes + torch.randn(documents, length, LAYERS, EXPERTS, generator=g)
    selected = wishes.topk(TOP_K).indices.flatten(0, 1).to(torch.int16)
    numbers = torch.arange(documents).repeat_interleave(length)
    return RoutingTrace(selected, numbers, EXPERTS, tuple(f"layer {i}" for i in range(LAYERS)))


def trace_of_experts(value: RoutingTrace, order: list[int]) -> RoutingTrace:
    return replace(value, selected=torch.tensor(order).argsort()[value.selected.long()].to(torch.int16))


def trace_of_documents(value: RoutingTrace, order: list[int]) -> RoutingTrace:
    parts = list(value.by_document())
    return replace(value, selected=torch.cat([parts[i] for i in order]))


def of(size, change, *names, output=lambda result, order: result, compared=lambda result: result) -> Reordering:
    """The named inputs, each changed by `change(value, order)`."""
    return Reordering(
        size=size,
        inputs=lambda given, order: {**given, **{name: change(given[name], order) for name in names}},
        output=output,
        compared=compared,
    )


def model(g: torch.Generator, family: str = "OLMoE", **changes):
    """One layer fewer than the families' usual ones, drawn from the generator."""
    seed = int(torch.randint(2**31, (), generator=g))
    made = tiny(family, seed, num_hidden_layers=2, **changes)
    made.set_experts_implementation("eager")  # the grouped product of a CPU knows no float64
    made.set_attn_implementation("eager")  # and its fused attention makes zeros of a query that is NaN
    return made


def model_of_experts(value, order: list[int]):
    for layer in mixture_layers(value):
        permute_experts(layer, order)
    return value


def batch(g: torch.Generator, documents: int = DOCUMENTS, length: int = LENGTH) -> Batch:
    """The second half of every document is its answer; the last document is padded."""
    ids = torch.randint(3, 97, (documents, length), generator=g)
    labels = torch.arange(documents)[:, None].remainder(2).expand(documents, length).contiguous()
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    answers = torch.arange(length).expand(documents, length) >= length // 2
    return Batch(ids, mask, labels, torch.arange(documents) // 2 % 2, answers)


def batch_of_documents(value: list[Batch], order: list[int]) -> list[Batch]:
    return [Batch(**{name: part[order] for name, part in vars(one).items()}) for one in value]


def padded_batch(value: list[Batch]) -> list[Batch]:
    """Two more tokens at the end of every document, masked, and of some label."""
    more = {"input_ids": 7, "attention_mask": 0, "labels": 1, "answers": True}

    def longer(name, part):
        if name not in more:
            return part
        return torch.cat([part, torch.full((len(part), 2), more[name], dtype=part.dtype)], 1)

    return [Batch(**{name: longer(name, part) for name, part in vars(one).items()}) for one in value]
