# SPDX-License-Identifier: Apache-2.0
"""Who looks at generated garments: a network that names the garment, and a detector of marks that is no template.

Both are small convolutional networks trained here on real pictures. The one for garments has never seen a mark; its
penultimate features are the space of the Frechet distance. The one for marks learned from marks at any place, from
buttons and from rings, and had no part in the labels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.data.streams import ShuffledIndices
from anabranch.jobs.erase.marked_garments import World, clean_world, with_known, with_mark
from anabranch.train.loop import TrainConfig, train

WIDTH, FEATURES = 16, 32
FEATURE_SPACE = f"{FEATURES} features of a garment classifier trained on clean pictures"


class Judge(nn.Module):
    """(B, 1, 28, 28) uint8 -> logits (B, classes); objective of its own training."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * WIDTH * 49, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.body(pixels.float() / 127.5 - 1)
        return features

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.head(self.features(batch["pixels"]))
        return {"loss": nn.functional.cross_entropy(logits, batch["label"])}


class Labelled:
    def __init__(self, pixels: Tensor, labels: Tensor, batch_size: int, seed: int):
        self.pixels, self.labels = pixels, labels
        self.indices = ShuffledIndices(len(pixels), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        return {"pixels": self.pixels[rows], "label": self.labels[rows]}


@dataclass(frozen=True, eq=False)
class Judges:
    garment: Judge
    mark: Judge

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(garment (N,), features (N, 32), chance of a mark (N,))."""
        features = torch.cat([self.garment.features(part) for part in pixels.split(500)])
        chance = torch.cat([self.mark.head(self.mark.features(part)).softmax(1)[:, 1] for part in pixels.split(500)])
        return self.garment.head(features).argmax(1), features, chance


def train_judges(images: Images, folder: Path, *, steps: int = 1200, seed: int = 7) -> Judges:
    """Trained once; read from `folder` afterwards."""
    world = clean_world(images)
    judges = Judges(Judge(len(images.class_names)), Judge(2))
    for name, judge, pixels, labels in (
        ("garment", judges.garment, world.pixels, world.classes),
        ("mark", judges.mark, *marks_and_none(world, seed)),
    ):
        file = folder / f"{name}.safetensors"
        if file.is_file():
            judge.load_state_dict(load_file(file))
        else:
            warmup = min(50, steps // 2)
            config = TrainConfig(steps=steps, batch_size=64, learning_rate=2e-3, warmup_steps=warmup, seed=seed)
            train(judge, Labelled(pixels, labels, 64, seed), config)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(judge.state_dict(), file)
        judge.eval().requires_grad_(False)
    return judges


def marks_and_none(world: World, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the pictures with a mark somewhere; buttons and rings on both halves."""
    marked = with_mark(world, 0.5, seed, places=None)
    mixed = with_known(with_known(marked, 0.25, seed, "unlike"), 0.25, seed + 1, "alike")
    return mixed.pixels, mixed.marked.long()
