# SPDX-License-Identifier: Apache-2.0
"""Do the steps' experts do what they are for? Losses under right and wrong experts, notes and readers.

Equation  : own, wrong    mean -log p of a step's tokens with the experts of their steps, of the next step, drawn ones;
                          request: with the step's own experts on every token before it, too
            notes         -log p of the answer after another chain's notes, minus that after its own, a row
            reader        max over pairs of readers e, f of KL(p_e || p_f), p the next word's distribution after the
                          question as read by one expert; mean over questions
Shapes    : batches of `StepSpanCollator(question=None)`; S steps.
Reading   : wrong no worse than own: the experts are alike. Notes near 0: the answer ignores them. A large reader:
            drawing who reads the question in training has not made the experts equal there.
Check     : experts that are all alike give own = wrong and reader 0; an answer that copies its notes has a gap, one
            that does not look has none (tests/specialize/mote/test_diagnose.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anabranch.specialize.mote.collate import IGNORED, Row, StepSpanCollator
from anabranch.specialize.mote.mote import MoTE
from anabranch.specialize.mote.steps import Span

Batch = Mapping[str, Tensor]


@torch.no_grad()
def losses(mote: MoTE, batch: Batch, step_ids: Tensor | None = None) -> Tensor:
    """(B, T - 1): -log p of every labelled token, NaN elsewhere; `step_ids`: read with the experts of other steps."""
    ids = batch["step_ids"] if step_ids is None else step_ids
    logits = mote(batch["input_ids"], ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    told = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return told.masked_fill(labels == IGNORED, torch.nan)


def by_step(mote: MoTE, batch: Batch, told: Tensor) -> dict[str, float]:
    """Mean of each step's tokens, its start token left out: that is foreseen by whoever comes before, or given. NaN
    for a step that is not there."""
    return {
        name: float(told[within(batch, number) & ~told.isnan()].mean())
        for number, name in enumerate(mote.settings.steps.names)
    }


def within(batch: Batch, step: int) -> Tensor:
    """(B, T - 1): the predictions that a step makes of itself."""
    steps = batch["step_ids"]
    return (steps[:, 1:] == step) & (steps[:, :-1] == step)


def right_and_wrong(mote: MoTE, batch: Batch, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Loss by step, with its own experts, those of the next step, one drawn a token, and ("request") with its own on
    everything before it as well, as an engine with one adapter a request reads."""
    ids, num = batch["step_ids"], len(mote.settings.steps)
    inside = ids >= 0
    drawn = torch.randint(num, ids.shape, generator=torch.Generator().manual_seed(seed)).to(ids)
    wrong = {"own": ids, "next": torch.where(inside, (ids + 1) % num, ids), "drawn": torch.where(inside, drawn, ids)}
    found = {name: by_step(mote, batch, losses(mote, batch, changed)) for name, changed in wrong.items()}
    every = [by_step(mote, batch, losses(mote, batch, torch.full_like(ids, number))) for number in range(num)]
    names = mote.settings.steps.names
    return found | {"request": {name: told[name] for name, told in zip(names, every, strict=True)}}


def notes_count(mote: MoTE, rows: Sequence[Row], pad_id: int, batch_size: int = 32) -> Tensor:
    """(rows with notes,): how much worse the answer is foreseen after the notes of the next row with the same steps."""
    by_shape: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if len(row.step_spans) > 1:
            by_shape.setdefault(tuple(span.step for span in row.step_spans), []).append(row)
    pairs = [
        (row, exchanged(row, alike[(i + 1) % len(alike)]))
        for alike in by_shape.values()
        if len(alike) > 1
        for i, row in enumerate(alike)
    ]
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    return torch.cat([gap(mote, part, pad_id) for part in parts]) if parts else torch.zeros(0)


def gap(mote: MoTE, pairs: Sequence[tuple[Row, Row]], pad_id: int) -> Tensor:
    """(pairs,): mean loss of the answer in the second row of each pair, minus that in the first."""
    collate = StepSpanCollator(mote.tokens, pad_id, question=None)
    answer = len(mote.settings.steps) - 1
    means = []
    for told in (collate(list(rows)) for rows in zip(*pairs, strict=True)):
        means.append(losses(mote, told).masked_fill(~within(told, answer), torch.nan).nanmean(-1))
    return means[1] - means[0]


def exchanged(row: Row, other: Row) -> Row:
    """The row's question and answer, the other's notes between them."""
    answer, first = row.step_spans[-1], row.step_spans[0].start
    notes = other.input_ids[other.step_spans[0].start : other.step_spans[-1].start]
    shift = first - other.step_spans[0].start
    moved = [Span(span.step, span.start + shift, span.stop + shift) for span in other.step_spans[:-1]]
    start = first + len(notes)
    tail = row.input_ids[answer.start :]
    spans = [*moved, Span(answer.step, start, start + answer.stop - answer.start)]
    return Row([*row.input_ids[:first], *notes, *tail], spans)


@torch.no_grad()
def reader_matters(mote: MoTE, questions: Sequence[Sequence[int]]) -> Tensor:
    """(questions,): the largest divergence between what two readers of a question expect next, in nats."""
    found = []
    for question in questions:
        ids = torch.tensor([list(question)])
        logs = torch.stack([
            mote(ids, torch.full_like(ids, number)).logits[0, -1].float().log_softmax(-1)
            for number in range(len(mote.settings.steps))
        ])  # fmt: skip
        kl = (logs[:, None].exp() * (logs[:, None] - logs[None])).sum(-1)
        found.append(kl.max())
    return torch.stack(found)


def questions_of(rows: Sequence[Row]) -> list[list[int]]:
    return [row.input_ids[: row.step_spans[0].start] for row in rows]
