# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts merge`: a stock checkpoint in which several experts share one set of weights, and what that costs.

OUT/            the checkpoint; members of a group hold copies of the merged weights, so transformers opens it alone
OUT/experts.json    who was merged with whom, the losses by label before and after, and of random groups
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.experts.card import experts_card
from anabranch.jobs.experts.settings import MergeSettings
from anabranch.jobs.experts.texts import batches_of, halves, read_windows
from anabranch.jobs.experts.written import RESULT, averaged, change, losses_by_label, tell_losses, write_checkpoint
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.calibration import Batch, captured
from anabranch.reuse.merge import mc_smoe, sub_moe
from anabranch.reuse.merge.tie import Labels, members, tie
from anabranch.train.publish import refuse_other_results
from anabranch.train.touch import digest, touch_report

METHODS = ("mc_smoe", "sub_moe")
CONTROLS = 3
"""Random groupings that a method is compared with."""


def experts_merge(settings: MergeSettings) -> dict[str, Any]:
    """Write settings.out; returns what experts.json holds."""
    refuse_other_results(settings.out, RESULT)
    if settings.by not in METHODS:
        raise UsageError(f"there is no merging by {settings.by!r}", hint=did_you_mean(settings.by, METHODS))
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    layers = open_layers(model)
    texts = read_windows(settings.data, tokenizer, length=settings.length, limit=settings.limit)
    calibration, texts = halves(texts)
    batches = batches_of(calibration, settings.target)
    if not 1 <= settings.keep < layers[0].num_experts:
        raise UsageError(
            "keep cannot be used", expected=f"1 to {layers[0].num_experts - 1}", received=settings.keep,
            hint="with all of them kept nothing would be merged",
        )  # fmt: skip
    before, drawn = losses_by_label(model, texts), copy.deepcopy(model)
    usage, digests = usage_of(model, batches), digest(model)
    labels = merged(settings, model, batches)
    shared = [name for name, own in labels.items() if len(set(own)) < len(own)]
    report = touch_report(digests, digest(model), named=[f"{name}.experts.*" for name in shared])
    after = losses_by_label(model, texts)
    controls = []
    for draw in range(CONTROLS):
        other = copy.deepcopy(drawn)
        at_random(other, settings.by, labels, usage, torch.Generator().manual_seed(CONTROLS * settings.seed + draw))
        found = losses_by_label(other, texts)
        controls.append({name: change(before[name], found[name]) for name in before})
    rows = {
        settings.by: {name: change(before[name], after[name]) for name in before},
        f"random groups, mean of {CONTROLS}": averaged(controls),
    }
    told = {
        "by": settings.by, "target": list(settings.target), "losses": rows,
        "groups": {name: list(members(own).values()) for name, own in labels.items()},
        "distinct": sum(len(set(own)) for own in labels.values()), "of": sum(map(len, labels.values())),
        "touched": list(report.changed), "left_alone": len(report.left_alone),
    }  # fmt: skip
    write_checkpoint(model, tokenizer, settings.out, told, experts_card("merged", told, settings))
    tell_losses(rows, before)
    print(f"\ncheckpoint  {settings.out}    ({told['distinct']} of {told['of']} experts are distinct)")
    return told


def usage_of(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """(N,) tokens of each expert, by layer."""
    layers = open_layers(model)
    seen = captured(model, layers, batches)
    return {layer.name: seen[layer.name].usage(layer.num_experts).cpu() for layer in layers}


def merged(settings: MergeSettings, model: Any, batches: Sequence[Batch]) -> Labels:
    """In place: the groups."""
    if settings.by == "mc_smoe":
        return mc_smoe.merge(model, batches, settings.keep * len(open_layers(model))).labels
    return sub_moe.merge(model, batches, settings.keep, seed=settings.seed).labels


def at_random(model: Any, by: str, labels: Labels, usage: dict[str, Tensor], generator: torch.Generator) -> None:
    """The control, in place: groups of the method's own sizes, their members drawn; weighed and aligned as it does."""
    for layer in open_layers(model):
        order = torch.randperm(layer.num_experts, generator=generator)
        drawn = [0] * layer.num_experts
        for group in members([labels[layer.name][e] for e in order.tolist()]).values():
            busiest = max(group, key=lambda e: float(usage[layer.name][e]))
            for expert in group:
                drawn[expert] = busiest
        if by == "mc_smoe":
            mc_smoe.align(layer, drawn)
        tie(layer, drawn, usage[layer.name])
