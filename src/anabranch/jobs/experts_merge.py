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
from anabranch.jobs.experts_settings import MergeSettings
from anabranch.jobs.experts_texts import Windows, read_windows
from anabranch.jobs.experts_written import RESULT, change, losses_by_label, tell_losses, write_checkpoint
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.calibration import Batch
from anabranch.reuse.merge import mc_smoe, sub_moe
from anabranch.reuse.merge.tie import Labels, members, tie
from anabranch.train.publish import refuse_other_results

METHODS = ("mc_smoe", "sub_moe")


def experts_merge(settings: MergeSettings) -> dict[str, Any]:
    """Write settings.out; returns what experts.json holds."""
    refuse_other_results(settings.out, RESULT)
    if settings.by not in METHODS:
        raise UsageError(f"there is no merging by {settings.by!r}", hint=did_you_mean(settings.by, METHODS))
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    layers = open_layers(model)
    texts = read_windows(settings.data, tokenizer, length=settings.length, limit=settings.limit)
    batches = batches_of(texts, settings.target)
    if not 1 <= settings.keep < layers[0].num_experts:
        raise UsageError(
            "keep cannot be used", expected=f"1 to {layers[0].num_experts - 1}", received=settings.keep,
            hint="with all of them kept nothing would be merged",
        )  # fmt: skip
    before, drawn = losses_by_label(model, texts), copy.deepcopy(model)
    labels, usage = merged(settings, model, batches)
    after = losses_by_label(model, texts)
    at_random(drawn, labels, usage, settings.seed)
    control = losses_by_label(drawn, texts)
    rows = {
        settings.by: {name: change(before[name], after[name]) for name in before},
        "random groups": {name: change(before[name], control[name]) for name in before},
    }
    told = {
        "by": settings.by, "target": list(settings.target), "losses": rows,
        "groups": {name: list(members(own).values()) for name, own in labels.items()},
        "distinct": sum(len(set(own)) for own in labels.values()), "of": sum(map(len, labels.values())),
    }  # fmt: skip
    write_checkpoint(model, tokenizer, settings.out, told)
    tell_losses(rows, before)
    print(f"\ncheckpoint  {settings.out}    ({told['distinct']} of {told['of']} experts are distinct)")
    return told


def batches_of(texts: Sequence[Windows], target: Sequence[str]) -> list[Batch]:
    labels = {windows.label for windows in texts}
    if missing := sorted(set(target) - labels):
        raise UsageError("a target has no text", expected=f"--data {missing[0]}=FILE", received=missing[0])
    own = [windows for windows in texts if not target or windows.label in target]
    return [{"input_ids": one.input_ids, "attention_mask": one.attention_mask} for one in own]


def merged(settings: MergeSettings, model: Any, batches: Sequence[Batch]) -> tuple[Labels, dict[str, Tensor]]:
    """In place: the groups, and the usage of every expert by layer."""
    layers = open_layers(model)
    if settings.by == "mc_smoe":
        found = mc_smoe.merge(model, batches, settings.keep * len(layers))
        return found.labels, {layer.name: found.usage[i] for i, layer in enumerate(layers)}
    other = sub_moe.merge(model, batches, settings.keep, seed=settings.seed)
    return other.labels, {layer.name: torch.ones(layer.num_experts) for layer in layers}


def at_random(model: Any, labels: Labels, usage: dict[str, Tensor], seed: int) -> None:
    """The control: groups of the same sizes, their members drawn."""
    generator = torch.Generator().manual_seed(seed)
    for layer in open_layers(model):
        order = torch.randperm(layer.num_experts, generator=generator).tolist()
        tie(layer, [labels[layer.name][e] for e in order], usage[layer.name])
