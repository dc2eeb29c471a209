# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts tune`: only the experts that a task uses learn it; everything else stays bit for bit.

OUT/            the tuned experts alone, which many of can be served over one base
OUT/experts.json    the losses by label before and after
MERGED/         with --merged the whole checkpoint, opened by transformers alone
"""

import json
from collections.abc import Iterator
from typing import Any

import torch

from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.experts.card import experts_card
from anabranch.jobs.experts.rank import chosen, module
from anabranch.jobs.experts.settings import TuneSettings
from anabranch.jobs.experts.texts import SHIPPED, Windows, read_windows
from anabranch.jobs.experts.written import (
    RESULT,
    Changed,
    change,
    losses_by_label,
    own_stats,
    tell_losses,
    write_checkpoint,
)
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.adapter import MANIFEST
from anabranch.specialize import ceft, esft
from anabranch.specialize.expert_tuning import Tuned
from anabranch.train.publish import publish_folder, refuse_other_results
from anabranch.train.touch import digest, touch_report

LEARNT = 0.9
"""Of the first text, from its start; the rest is held out."""


def experts_tune(settings: TuneSettings) -> dict[str, Any]:
    """Write settings.out, and settings.merged if given; returns what experts.json holds.

    Raises:
        CheckFailed: after everything is written, where held-out windows of what was learnt are not foreseen better.
    """
    refuse_other_results(settings.out, RESULT)
    if settings.merged is not None:
        refuse_other_results(settings.merged, RESULT)
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    stats = own_stats(settings.stats, model)
    stats.index(settings.target)
    chosen([settings.by], stats)
    learnt, texts = to_learn_and_ask(settings, tokenizer)
    before, digests = losses_by_label(model, texts), digest(model)
    tuned = train(settings, model, stats, learnt)
    after = losses_by_label(model, texts)
    report = touch_report(digests, digest(model), named=[f"{name}.experts.*" for name in tuned.adapter.experts])
    rows = {settings.by: {name: change(before[name], after[name]) for name in before}}
    told = {
        "by": settings.by, "target": settings.target, "experts": {n: list(e) for n, e in tuned.adapter.experts.items()},
        "losses": rows, "tuned_weights": sum(value.numel() for value in tuned.adapter.tensors.values()),
        "weights": sum(value.numel() for value in model.parameters()),
        "touched": list(report.changed), "left_alone": len(report.left_alone),
    }  # fmt: skip

    def write(folder: Any) -> None:
        tuned.adapter.save(folder)
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | told  # one file has both
        (folder / RESULT).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(experts_card("tuned", told, settings, adapter=True), encoding="utf-8")

    publish_folder(write, settings.out)
    if settings.merged is not None:
        write_checkpoint(model, tokenizer, settings.merged, told, experts_card("tuned", told, settings))
    tell(settings, told, tuned, before)
    refuse_nothing_learnt(settings.by, learnt.label, told["losses"][settings.by][learnt.label])
    return told


def to_learn_and_ask(settings: TuneSettings, tokenizer: Any) -> tuple[Windows, list[Windows]]:
    """A shipped text has a part for each; of a file the first windows are learnt and its rest is asked."""
    shape = {"length": settings.length, "limit": settings.limit, "least": 10}
    texts = read_windows(settings.data, tokenizer, **shape)
    if settings.data[0].partition("=")[2].startswith(SHIPPED):
        return read_windows(settings.data[:1], tokenizer, **shape, part="train")[0], texts
    first = texts[0]
    cut = int(LEARNT * len(first.input_ids))
    learnt = Windows(first.label, first.input_ids[:cut], first.attention_mask[:cut])
    held_out = Windows(first.label, first.input_ids[cut:], first.attention_mask[cut:])
    return learnt, [held_out, *texts[1:]]


def train(settings: TuneSettings, model: Any, stats: ExpertStats, learnt: Windows) -> Tuned:
    others = [label for label in stats.labels if label != settings.target]
    scores = module(settings.by).rank(stats, settings.target, others)
    shared = {"steps": settings.steps, "learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay}
    try:
        if settings.num:
            config = ceft.Config(num_experts=settings.num, **shared)
            return ceft.train(model, scores, stats.layers, batches(settings, learnt), config)
        return esft.train(model, scores, stats.layers, batches(settings, learnt), esft.Config(p=settings.p, **shared))
    except ValueError as error:
        raise UsageError(str(error)) from None


def batches(settings: TuneSettings, learnt: Windows) -> Iterator[Batch]:
    """Without end, in an order drawn anew for every pass."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(learnt.input_ids))
    while True:
        order = torch.randperm(len(learnt.input_ids), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            ids, mask = learnt.input_ids[rows], learnt.attention_mask[rows]
            yield Batch(ids, mask, torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.long))


def refuse_nothing_learnt(by: str, label: str, found: Changed) -> None:
    """What was learnt by heart and not better foreseen where it was not seen is no success."""
    if found["high"] is None or found["high"] >= 0:
        raise CheckFailed(
            f"{label} is not shown to be better foreseen than before", expected="a change below 0 on windows held out",
            received=f"{found['change']:+.3f} [{found['low']}, {found['high']}] nats a token, experts by {by}",
            hint="a smaller --learning-rate, fewer --steps, more text",
        )  # fmt: skip


def tell(settings: TuneSettings, told: dict[str, Any], tuned: Tuned, before: Any) -> None:
    counts = [len(experts) for experts in tuned.adapter.experts.values()]
    share = 100 * told["tuned_weights"] / told["weights"]
    print(f"{sum(counts)} experts in {len(counts)} layers learnt, {told['tuned_weights']:,} weights ({share:.1f} %)\n")
    tell_losses(told["losses"], before)
    print(f"\nadapter     {settings.out}")
    if settings.merged is not None:
        print(f"checkpoint  {settings.merged}    (transformers opens it alone)")
