# SPDX-License-Identifier: Apache-2.0
"""What the arms on one base of garments share: pictures, labels, prompts, seeds, and the training of a step budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.data.images import Images
from anabranch.jobs.erase.garment_judges import Judges
from anabranch.jobs.erase.marked_garments import (
    GRID,
    Boxes,
    World,
    bin_word,
    caption_of,
    clean_world,
    with_mark,
)
from anabranch.jobs.erase.sample import Sampling
from anabranch.models.diffusion.family import open_pipeline
from anabranch.models.diffusion.latents import to_latents
from anabranch.suppress.detectors.protocol import Detector
from anabranch.suppress.geom_erasing.bins import Bin
from anabranch.suppress.geom_erasing.erase import Prepared
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.train.loop import TrainConfig, train


@dataclass(frozen=True)
class KnownPlaces(Vocabulary):
    """Bins are called what the base calls them: only the concept's name is new."""

    def place(self, where: Bin) -> str:
        return bin_word(where)

    def words(self) -> list[str]:
        return [self.name]


NEW_WORDS = Vocabulary(name="<mark>", grid=GRID)
KNOWN_WORDS = KnownPlaces(name="<mark>", grid=GRID)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What was tuned, on a base that the table does not use."""

    images: int = 20_000
    ratio: float = 0.8
    recall: float = 0.5
    """Share of the marks that the detector finds; the captions of the others stay plain."""
    steps: int = 250
    long_steps: int = 700
    """Of arms with places that are new to the base: they are learned in this time, and not in the other."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    token_rate: float = 10.0
    alpha: float = 1.0
    trained: str = "denoiser"
    r: int = 16
    scale: float = 2.0
    sample_steps: int = 12
    frozen_token_rate: float = 100.0
    """Of model removal, where the words have to do all of it; tuned on base 3, which the table has as well."""
    short_steps: int = 150
    """Of Concept Ablation and of baking."""
    eraser_steps: int = 60
    """Of ESD, whose every step samples."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """One base and all that its arms share."""

    base: Path
    images: Images
    judges: Judges
    detector: Detector
    regime: Regime
    seed: int
    samples: int
    noted: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def world(self) -> World:
        few = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed))
        return with_mark(clean_world(self.images.take(few[: self.regime.images])), self.regime.ratio, 1000 + self.seed)

    @cached_property
    def latents(self) -> Tensor:
        return to_latents(self.open(), self.world.pixels)

    @cached_property
    def prompts(self) -> list[str]:
        names = [caption_of(name) for name in self.images.class_names]
        return [names[i % len(names)] for i in range(self.samples)]

    @property
    def seeds(self) -> list[int]:
        return list(range(10_000, 10_000 + self.samples))

    @property
    def how(self) -> Sampling:
        return Sampling(scale=self.regime.scale, steps=self.regime.sample_steps, batch_size=250)

    def open(self) -> Any:
        return open_pipeline(self.base)

    def nothing(self) -> list[str]:
        """The empty negative prompt for every picture."""
        return [""] * self.samples

    def labels(self, recall: float | None = None, world: World | None = None) -> Boxes:
        """What a detector of this recall says of every picture; None where it sees nothing."""
        world = self.world if world is None else world
        chance = torch.rand(len(world), generator=torch.Generator().manual_seed(2000 + self.seed))
        found = (chance < (self.regime.recall if recall is None else recall)).tolist()
        return [boxes if boxes and seen else None for boxes, seen in zip(world.boxes, found, strict=True)]


@dataclass(eq=False, kw_only=True)
class Made:
    """A model with an arm's changes, and the negative prompts that it is drawn with."""

    pipe: Any
    negatives: dict[str, Callable[[], Sequence[str]]]
    words: Vocabulary = KNOWN_WORDS
    prepared: Prepared | None = None
    drawn: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Policies that draw in a way of their own."""


def run(bench: Bench, objective: Any, stream: Any, *, steps: int | None = None, batch_size: int | None = None) -> None:
    regime = bench.regime
    config = TrainConfig(
        steps=steps or regime.steps,
        batch_size=batch_size or regime.batch_size,
        learning_rate=regime.learning_rate,
        warmup_steps=min(20, (steps or regime.steps) // 2),
        weight_decay=0.0,
        betas=(0.9, 0.99),
        max_grad_norm=1.0,
        seed=bench.seed,
        deterministic=False,
    )
    losses = train(objective, stream, config).losses[-20:]
    bench.noted["loss"] = sum(losses) / len(losses)
