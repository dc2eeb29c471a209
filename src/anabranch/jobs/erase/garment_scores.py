# SPDX-License-Identifier: Apache-2.0
"""What the arms of the garments are drawn as, and what two detectors and a judge of garments say of the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.jobs.erase.garment_bench import Bench, Made
from anabranch.jobs.erase.marked_garments import GRID, MARK_PLACES, PLATE, SIDE
from anabranch.jobs.erase.sample import as_arrays, draw
from anabranch.suppress.detectors.protocol import Detector, detect_checked
from anabranch.suppress.geom_erasing.bins import covered_bins

BROKEN = 0.6
"""Correlation with the mark's picture; clean garments reach it in .2 %."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """A picture a row."""

    hits: Tensor  # (N,) bool: the detector of the labels
    broken: Tensor  # (N,) bool: the same at BROKEN, which marks that are drawn by half reach
    second: Tensor  # (N,) bool: the other one
    right: Tensor  # (N,) bool: the garment that was asked for
    features: Tensor  # (N, 32)


def score(bench: Bench, pixels: Tensor) -> Scored:
    garments, features, chance = bench.judges.look(pixels)
    asked = torch.arange(len(pixels)) % len(bench.images.class_names)
    best = scores(bench.detector, pixels)
    return Scored(
        hits=best > bench.detector.threshold, broken=best > BROKEN, second=chance > 0.5, right=garments == asked,
        features=features,
    )  # fmt: skip


def scores(detector: Detector, pixels: Tensor) -> Tensor:
    """(N,) the best score in each picture, 0 where there is no candidate."""
    found = detect_checked(detector, as_arrays(pixels))
    return torch.tensor([max((d.score for d in detections), default=0.0) for detections in found], dtype=torch.double)


def place_control(bench: Bench, made: Made, count: int = 320) -> dict[str, float]:
    """Asked for at one of its places: is the mark drawn, and is it there? Chance of the place is one in sixteen."""
    places = [MARK_PLACES[i % len(MARK_PLACES)] for i in range(count)]
    asked = [[(x, y, x + PLATE, y + PLATE)] for x, y in places]
    prompts = [
        f"{bench.prompts[i % len(bench.prompts)]} {made.words.suffix(covered_bins(boxes, SIDE, SIDE, GRID))}"
        for i, boxes in enumerate(asked)
    ]
    pixels = draw(made.pipe, prompts, [""] * count, list(range(20_000, 20_000 + count)), bench.how)
    found = detect_checked(bench.detector, as_arrays(pixels))
    boxes = [[d.box for d in ds if d.score > bench.detector.threshold] for ds in found]
    there = [
        any(abs(x1 - x) <= 2 and abs(y1 - y) <= 2 for x1, y1, *_ in seen)
        for seen, (x, y) in zip(boxes, places, strict=True)
    ]
    drawn = sum(map(bool, boxes))
    return {"drawn": drawn / count, "in_place": sum(there) / max(1, drawn), "count": count}


def draw_policies(bench: Bench, made: Made, policies: Sequence[str]) -> dict[str, Tensor]:
    """Pictures (N, 1, 28, 28) of each policy that the arm has."""
    found = {}
    for policy in policies:
        if policy in made.drawn:
            found[policy] = made.drawn[policy]()
        elif policy in made.negatives:
            found[policy] = draw(made.pipe, bench.prompts, list(made.negatives[policy]()), bench.seeds, bench.how)
    return found
