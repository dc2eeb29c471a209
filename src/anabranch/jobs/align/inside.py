# SPDX-License-Identifier: Apache-2.0
"""What happens inside a mixture on chains it was not trained on: who helps whom, and what wrong experts would do."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.jobs.align.train import norms
from anabranch.measure.intervals import interval
from anabranch.specialize.mote.collate import Row, StepSpanCollator
from anabranch.specialize.mote.diagnose import notes_count, questions_of, reader_matters, right_and_wrong, within
from anabranch.specialize.mote.generate import pad_of
from anabranch.specialize.mote.interference import step_conflict, step_transfer
from anabranch.specialize.mote.mote import MoTE

PARTS, MOST_ROWS, MOST_QUESTIONS = 4, 256, 64
LENGTH = 0.1
"""Of the step along a gradient whose effect is the transfer."""
DWARFED, ALIKE, READER = 0.05, 0.01, 0.1


def inside(mote: MoTE, rows: Sequence[Row], batch_size: int) -> dict[str, Any]:
    """Losses by step under right and wrong experts, transfer and cosine between steps, what notes and readers do.

    Needs a mixture that can be trained; it is as before afterwards. Of many rows the first 256 are looked at.
    """
    rows = list(rows)[:MOST_ROWS]
    mote.eval()
    pad = pad_of(mote.tokenizer)
    collate = StepSpanCollator(mote.tokens, pad, question=None)
    batches = [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    counted = [right_and_wrong(mote, batch) for batch in batches]
    names = mote.settings.steps.names
    found: dict[str, Any] = {
        "rows": len(rows),
        "nll": {
            whose: {
                name: weighted([each[whose][name] for each in counted], batches, number)
                for number, name in enumerate(names)
            }
            for whose in counted[0]
        },
        "notes": told(notes_count(mote, rows, pad, batch_size)),
        "reader": float(reader_matters(mote, questions_of(rows)[:MOST_QUESTIONS]).median()),
        "norms": norms(mote),
        **between_steps(mote, rows, collate, names, batch_size),
    }  # fmt: skip
    return found | {"warnings": warnings_of(mote, found)}


def weighted(means: Sequence[float], batches: Sequence[Mapping[str, Tensor]], step: int) -> float | None:
    """The mean over all tokens of the step, from the means of the batches."""
    counts = [int((within(batch, step) & (batch["labels"][:, 1:] >= 0)).sum()) for batch in batches]
    total = sum(counts)
    return sum(m * c for m, c in zip(means, counts, strict=True) if c) / total if total else None


def told(values: Tensor) -> dict[str, Any] | None:
    if len(values) < 2:
        return None
    found = interval(values.tolist())
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": len(values)}


def between_steps(
    mote: MoTE, rows: Sequence[Row], collate: StepSpanCollator, names: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Transfer (per cent of a step's loss) and cosines, each over disjoint pairs of parts of the rows."""
    whole = [row for row in rows if len(row.step_spans) == len(names)]
    size = min(len(whole) // (2 * PARTS), batch_size)
    if size < 1:
        return {"transfer": None, "cosine": None}
    parts = [collate(whole[start : start + size]) for start in range(0, 2 * PARTS * size, size)]
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    return {
        "transfer": matrices([100 * step_transfer(mote, *pair, rate=LENGTH) for pair in pairs]),
        "cosine": matrices([step_conflict(mote, pair) for pair in pairs]),
    }


def matrices(found: Sequence[Tensor]) -> dict[str, Any]:
    """Mean and 95 % interval of each cell over the pairs."""
    stacked = torch.stack([matrix.detach().cpu().double() for matrix in found])
    cells = [[interval(stacked[:, i, j].tolist()) for j in range(stacked.shape[2])] for i in range(stacked.shape[1])]
    ends = {end: [[getattr(cell, end) for cell in row] for row in cells] for end in ("mean", "low", "high")}
    return {**ends, "pairs": len(found)}


def warnings_of(mote: MoTE, found: Mapping[str, Any]) -> list[str]:
    """Ways in which a mixture fails that its answers do not show."""
    warnings, sizes = [], found["norms"]
    if mote.settings.shared and mote.settings.assign == "step":
        own = [size for name, size in sizes.items() if name != "shared"]
        if sizes["shared"] < DWARFED * max(own):
            warnings.append("the shared expert is next to nothing beside the others: it carries no common knowledge")
        if max(own) < DWARFED * sizes["shared"]:
            warnings.append("the steps' experts are next to nothing beside the shared one: this is one LoRA")
    notes = found["notes"]
    if notes is not None and notes["high"] < ALIKE * (found["nll"]["own"][mote.settings.steps.answer] or 0.0):
        warnings.append("the answer is foreseen as well after the notes of another question: it does not read its own")
    if mote.settings.assign == "step" and found["reader"] > READER:
        warnings.append(
            f"who reads the question matters ({found['reader']:.2f} nats): the experts are not equal on questions"
        )
    own, wrong = found["nll"]["own"], found["nll"]["next"]
    alike = [name for name in own if own[name] is not None and wrong[name] - own[name] < ALIKE * own[name]]
    if mote.settings.assign == "step" and alike:
        warnings.append(f"the experts of other steps foresee as well: {', '.join(alike)} has no knowledge of its own")
    return warnings
