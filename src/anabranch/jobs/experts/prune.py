# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts prune`: a stock checkpoint of the experts that a task needs, and what that costs every label.

OUT/            the checkpoint, opened by transformers alone
OUT/experts.json    which experts stayed, the losses by label before and after, and of random prunings of the same size
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import CheckFailed, UsageError, did_you_mean
from anabranch.jobs.experts.card import experts_card
from anabranch.jobs.experts.rank import chosen, known, module
from anabranch.jobs.experts.settings import PruneSettings
from anabranch.jobs.experts.steer import expert_of
from anabranch.jobs.experts.texts import Windows, batches_of, halves, read_windows
from anabranch.jobs.experts.written import (
    RESULT,
    Changed,
    Losses,
    averaged,
    change,
    check_controls,
    losses_by_label,
    own_stats,
    tell_losses,
    write_checkpoint,
)
from anabranch.measure.experts.ranking import easy_ep, super_experts
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.reuse.prune import naee
from anabranch.reuse.prune.keep import Keep, masked, prune, random_keep, uniform
from anabranch.train.publish import refuse_other_results
from anabranch.train.touch import digest, touch_report

WITHOUT_STATS = ("naee", "random")
SUPER = "super"
TOLERANCE = 1e-5
"""Nats a token between the masked and the pruned model; they compute the same in another order."""


def experts_prune(settings: PruneSettings) -> dict[str, Any]:
    """Write settings.out; returns what experts.json holds.

    Raises:
        CheckFailed: written all the same, where the pruned model is not what the masked one was.
    """
    refuse_other_results(settings.out, RESULT)
    check_controls(settings.controls)
    check(settings)
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    layers = open_layers(model)
    if settings.keep >= layers[0].num_experts:
        raise UsageError(
            "nothing would be pruned", expected=f"--keep below {layers[0].num_experts}", received=settings.keep
        )
    stats = None if settings.stats is None else own_stats(settings.stats, model)
    texts = read_windows(settings.data, tokenizer, length=settings.length, limit=settings.limit)
    calibration, texts = halves(texts) if settings.by == "naee" else ([], texts)
    protect = protected(settings, stats)
    keep = to_keep(settings, model, layers, stats, calibration, protect)
    before, digests = losses_by_label(model, texts), digest(model)
    drawn = controls(settings, model, layers, texts, before, protect)
    rows = {f"random, mean of {len(drawn)}": averaged(drawn)} if drawn else {}
    with masked(layers, keep):
        expected = losses_by_label(model, texts)
    prune(model, keep)
    report = touch_report(digests, digest(model), named=[f"{layer.name}.*" for layer in layers])
    after = losses_by_label(model, texts)
    rows = {settings.by: {name: change(before[name], after[name]) for name in before}} | rows
    told = {
        "by": settings.by, "target": list(settings.target), "kept": keep, "protected": [list(pair) for pair in protect],
        "losses": rows, "weights": sum(value.numel() for value in model.parameters()),
        "touched": list(report.changed), "left_alone": len(report.left_alone),
    }  # fmt: skip
    write_checkpoint(model, tokenizer, settings.out, told, experts_card("pruned", told, settings))
    tell_losses(rows, before)
    print(f"\ncheckpoint  {settings.out}    ({told['weights']:,} weights; transformers opens it alone)")
    refuse_difference(expected, after)
    return told


def check(settings: PruneSettings) -> None:
    if settings.by not in (*known(), *WITHOUT_STATS):
        raise UsageError(f"there is no ranking {settings.by!r}", hint=did_you_mean(settings.by, known()))
    if settings.by not in WITHOUT_STATS and settings.stats is None:
        raise UsageError(f"{settings.by} goes by statistics", expected="--stats", received="none")
    if not settings.target and settings.by != "random":
        raise UsageError("whose experts shall stay?", expected="--target, one label or more", received="none")
    if not settings.data:
        raise UsageError("nothing would tell what is lost", expected="--data name=FILE", received="none")


def protected(settings: PruneSettings, stats: ExpertStats | None) -> list[tuple[str, int]]:
    """(layer, expert) of --protect."""
    found: list[tuple[str, int]] = []
    for given in settings.protect:
        if stats is None:
            raise UsageError("experts are named by the statistics' layers", expected="--stats", received="none")
        if given == SUPER:
            found += [(stats.layers[one.layer], one.expert) for one in super_experts.found(stats)]
        else:
            found.append(expert_of(given, stats))
    return found


def to_keep(
    settings: PruneSettings, model: Any, layers: Sequence[MixtureLayer], stats: ExpertStats | None,
    calibration: Sequence[Windows], protect: Sequence[tuple[str, int]],
) -> Keep:  # fmt: skip
    if settings.by == "random":
        return random_keep(layers, settings.keep, torch.Generator().manual_seed(settings.seed), protect)
    if settings.by == "naee":
        return naee.search_progressive(model, batches_of(calibration, settings.target), settings.keep, protect).keep
    assert stats is not None
    chosen([settings.by], stats)
    return uniform(layers, scores_of(settings, stats), settings.keep, protect)


def scores_of(settings: PruneSettings, stats: ExpertStats) -> Tensor:
    """(L, N); of several targets each layer of each label counts the same."""
    if settings.by == "easy_ep":
        return easy_ep.mixed(stats, settings.target)
    others = [label for label in stats.labels if label not in settings.target]
    rank = partial(module(settings.by).rank, stats, others=others)
    if len(settings.target) == 1:
        return rank(target=settings.target[0])
    total = torch.zeros(len(stats.layers), stats.num_experts, dtype=torch.float64)
    for label in settings.target:
        scores = rank(target=label)
        lowest = scores.amin(-1, keepdim=True)
        total += (scores - lowest) / (scores - lowest).sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return total


def controls(
    settings: PruneSettings, model: Any, layers: Sequence[MixtureLayer], texts: Sequence[Windows], before: Losses,
    protect: Sequence[tuple[str, int]],
) -> list[dict[str, Changed]]:  # fmt: skip
    """Random prunings of the same size and with the same experts protected: the changes by label of each."""
    found = []
    for draw in range(settings.controls):
        generator = torch.Generator().manual_seed(1000 * (settings.seed + 1) + draw)
        keep = random_keep(layers, settings.keep, generator, protect)
        with masked(layers, keep):
            after = losses_by_label(model, texts)
        found.append({name: change(before[name], after[name]) for name in before})
    return found


def refuse_difference(expected: Losses, after: Losses) -> None:
    for label, losses in expected.items():
        difference = float((losses - after[label]).abs().max())
        if not difference <= TOLERANCE:
            raise CheckFailed(
                f"the pruned model is not what the masked one was on {label}", expected=f"at most {TOLERANCE} nats",
                received=f"{difference:.2g}",
            )  # fmt: skip
