# SPDX-License-Identifier: Apache-2.0
"""A bench: one model, one target domain, one draw of the texts that scores are computed from.

Losses are always on the same unseen windows; a change is in nats a byte, by domain.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS
from anabranch.data.streams import derived_seed
from anabranch.jobs.experts.profile import Everything
from anabranch.jobs.experts.texts import Windows, losses_of
from anabranch.measure.experts.ranking import dsmoe, router_lens
from anabranch.measure.experts.ranking.batches import Batch, read
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.mixtures.layers import MixtureLayer, open_layers

BATCH = 24
Change = dict[str, float]


@dataclass
class Bench:
    """One model, one target, one draw."""

    name: str
    model: Any
    target: str
    draw: int
    read_: dict[str, Windows]
    """What scores are computed from, by domain."""
    asked: dict[str, Windows]
    layers: list[MixtureLayer] = field(init=False)
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = open_layers(self.model)
        self.before = self.losses()

    def losses(self, model: Any = None) -> dict[str, Tensor]:
        return {name: losses_of(model or self.model, windows) for name, windows in self.asked.items()}

    def change(self, model: Any = None) -> Change:
        after = self.losses(model)
        return {name: float((after[name] - self.before[name]).mean()) for name in after}

    def within(self, context: AbstractContextManager[Any]) -> Change:
        with context:
            return self.change()

    @property
    def others(self) -> list[str]:
        return [name for name in DOMAINS if name != self.target]

    def batches(self, labels: Sequence[str]) -> list[Batch]:
        """Every domain's own label is its place in `labels`; those of no label are left out."""
        found = []
        for label, name in enumerate(labels):
            windows = self.read_[name]
            folds = windows.folds(10)
            for start in range(0, len(folds), BATCH):
                ids, mask = windows.input_ids[start : start + BATCH], windows.attention_mask[start : start + BATCH]
                rows = folds[start : start + BATCH]
                found.append(Batch(ids, mask, torch.full_like(ids, label), rows, answers=mask.bool()))
        return found

    def plain(self, labels: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in self.batches(labels)]

    def seed(self) -> torch.Generator:
        """Of this bench's own controls: other draws for every model, target and draw."""
        return torch.Generator().manual_seed(derived_seed("control", self.name, self.target, self.draw))


def statistics(bench: Bench) -> tuple[ExpertStats, dict[str, float]]:
    """All sums of one pass over every domain; seconds of a plain pass, of one with routing, of one with outputs too."""
    seconds = {}
    started = time.perf_counter()
    with torch.no_grad():
        for batch in bench.batches(DOMAINS):
            bench.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    seconds["forward"] = time.perf_counter() - started
    for name, outputs in (("routing", False), ("outputs", True)):
        started = time.perf_counter()
        collector = Everything(bench.model, bench.layers, DOMAINS, outputs=outputs, residual=outputs)
        stats = read(collector, bench.batches(DOMAINS))
        seconds[name] = time.perf_counter() - started
    return stats, seconds


def with_gradients(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """Rankings that need more than a pass."""

    def by_dsmoe() -> Tensor:
        stats = dsmoe.collect(bench.model, bench.batches([bench.target]))
        return dsmoe.rank(stats)

    def by_router_lens() -> Tensor:
        lens = router_lens.collect(
            bench.model, bench.batches([bench.target]), [bench.target], epochs=2, learning_rate=5e-3
        )
        return router_lens.rank(lens.stats, bench.target)

    return {"dsmoe": by_dsmoe, "router_lens": by_router_lens}
