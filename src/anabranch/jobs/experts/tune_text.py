# SPDX-License-Identifier: Apache-2.0
"""What `experts tune` learns and what it is asked: never the same windows."""

from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import ShuffledIndices
from anabranch.jobs.experts.settings import TuneSettings
from anabranch.jobs.experts.texts import SHIPPED, Windows, read_windows
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.specialize.expert_tuning import rows_of

LEARNT = 0.9
"""Of the first text, from its start; the rest is held out."""


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


class WindowBatches:
    """Stream of the training loop: windows in an order drawn anew for every pass, a pure function of (seed, step)."""

    def __init__(self, learnt: Windows, batch_size: int, *, seed: int):
        self.learnt, self.indices = learnt, ShuffledIndices(len(learnt.input_ids), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        ids, mask = self.learnt.input_ids[rows], self.learnt.attention_mask[rows]
        return rows_of(Batch(ids, mask, torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.long)))
