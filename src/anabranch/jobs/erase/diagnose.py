# SPDX-License-Identifier: Apache-2.0
"""The two diagnostics and the positive control: does a word control the concept, does it look at it, is it learnt?

D1        prompts with and without the word: phi of (word asked for, concept drawn).
D2        attention of the word's tokens against the boxes that the detector saw.
Control   the learnt name with the places of a training picture, in the positive prompt: drawn, and drawn there?
Shapes    : N pictures of S pixels, prompts and seeds; maps (N, h, w).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.jobs.erase.arms import Arm, Judges, Subject
from anabranch.jobs.erase.sample import Sampling
from anabranch.measure.concept_ratio import Rate, ratio
from anabranch.measure.controllability import Controllability, controllability
from anabranch.measure.localisation import Localisation, boxes_as_masks, localisation
from anabranch.models.diffusion.attention import token_maps
from anabranch.models.diffusion.latents import to_latents
from anabranch.suppress.detectors.protocol import Box
from anabranch.suppress.geom_erasing.adapter import Applied
from anabranch.suppress.geom_erasing.bins import Bin, Grid, covered_bins
from anabranch.suppress.geom_erasing.words import amended, cut, fitted, room, token_count


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """What asking for the concept at a place gives; `chance` is how often it would lie in the place of another."""

    drawn: Rate
    in_place: Rate | None
    """Of the pictures that have it."""
    chance: float
    words: Controllability
    arm: Arm
    asked: list[list[Box]]
    """The places that were asked for, of the pictures that are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """Attention of words in pictures of the concept."""

    where: Localisation
    maps: np.ndarray


def with_word(pipe: Any, prompts: Sequence[str], word: str) -> list[str]:
    """y (+) word; the prompt gives way where there is too little room."""
    left = room(pipe) - token_count(pipe, word)
    return [f"{cut(pipe, prompt, left)} {word}".strip() for prompt in prompts]


def word_control(
    without: np.ndarray, subject: Subject, prompts: Sequence[str], seeds: Sequence[int], judges: Judges, word: str
) -> tuple[Controllability, Arm]:
    """D1: `without` are the hits for the same prompts and seeds without the word."""
    asked = with_word(subject.pipe, prompts, word)
    arm = judges.arm(subject.draw(asked, seeds), asked)
    return controllability(without, arm.seen.hits), arm


def usable(boxes: Sequence[Sequence[Box]], side: int) -> list[int]:
    """Pictures whose boxes cover some of them, and not all."""
    shares = boxes_as_masks(boxes, side, side).mean((1, 2))
    return [i for i, share in enumerate(shares) if 0 < share < 1]


def looks(
    pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[str]], pixels: Tensor, boxes: Sequence[Sequence[Box]]
) -> Looks:
    """D2 on pictures that contain the concept; the words stand in the prompts."""
    maps = token_maps(pipe, prompts, words, to_latents(pipe, pixels).cpu().float()).double().numpy()
    side = pixels.shape[-1]
    return Looks(where=localisation(maps, boxes_as_masks(boxes, side, side)), maps=maps)


def looks_before(pipe: Any, prompts: Sequence[str], pixels: Tensor, boxes: Sequence[Sequence[Box]], word: str) -> Looks:
    return looks(pipe, with_word(pipe, prompts, word), [[word]] * len(prompts), pixels, boxes)


def looks_after(
    applied: Applied, prompts: Sequence[str], pixels: Tensor, boxes: Sequence[Sequence[Box]]
) -> tuple[Looks, Looks]:
    """Of the learnt name, and of the name with the places of the boxes; both stand in the prompt."""
    vocabulary, pipe = applied.adapter.vocabulary, applied.pipe
    places = [named_bins(applied, several, pixels.shape[-1]) for several in boxes]
    asked = [amended(pipe, vocabulary, prompt, bins) for prompt, bins in zip(prompts, places, strict=True)]
    words = [[vocabulary.name, *map(vocabulary.place, bins)] for bins in places]
    name = [[vocabulary.name]] * len(prompts)
    return looks(pipe, asked, name, pixels, boxes), looks(pipe, asked, words, pixels, boxes)


def named_bins(applied: Applied, boxes: Sequence[Box], side: int) -> list[Bin]:
    """The bins of the boxes, as many as a prompt has room for."""
    most = room(applied.pipe) - token_count(applied.pipe, applied.adapter.vocabulary.name)
    return fitted(covered_bins(boxes, side, side, applied.adapter.vocabulary.grid), most)


def drawn_bins(applied: Applied, count: int, seed: int) -> list[list[Bin]]:
    """Sets of bins of training pictures, drawn as often as they were there."""
    adapter = applied.adapter
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(adapter.counts, dtype=torch.float)
    return [adapter.training_bins[i] for i in torch.multinomial(weights, count, True, generator=generator).tolist()]


def positive_control(
    applied: Applied,
    unasked: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    judges: Judges,
    seed: int = 0,
) -> Control:
    """Name and places in the positive prompt, nothing in the negative one; `unasked` are the hits without."""
    vocabulary, pipe = applied.adapter.vocabulary, applied.pipe
    most = room(pipe) - token_count(pipe, vocabulary.name)
    bins = [fitted(several, most) for several in drawn_bins(applied, len(prompts), seed)]
    asked = [amended(pipe, vocabulary, prompt, several) for prompt, several in zip(prompts, bins, strict=True)]
    pixels = Subject(pipe=pipe, how=how).draw(asked, seeds)
    arm, side = judges.arm(pixels, asked), pixels.shape[-1]
    found = [(several, places) for several, places in zip(bins, middles(arm, side, vocabulary.grid), strict=True)]
    found = [(several, places) for several, places in found if places]
    inside = [any(place in several for place in places) for several, places in found]
    return Control(
        drawn=arm.seen.rate,
        in_place=ratio(inside) if inside else None,
        chance=chance_in_place(found),
        words=controllability(unasked, arm.seen.hits),
        arm=arm,
        asked=[frame(several, vocabulary.grid, side) for several in bins[: len(arm.pixels)]],
    )


def middles(arm: Arm, side: int, grid: Grid) -> list[list[Bin]]:
    """The bins in which the middles of the detector's boxes lie."""
    return [
        [
            (
                min(int((x1 + x2) / 2 * grid.columns / side), grid.columns - 1),
                min(int((y1 + y2) / 2 * grid.rows / side), grid.rows - 1),
            )
            for x1, y1, x2, y2 in boxes
        ]
        for boxes in arm.seen.boxes
    ]


def chance_in_place(found: Sequence[tuple[Sequence[Bin], Sequence[Bin]]]) -> float:
    """Share of pairs of different pictures in which what the one shows lies where the other was asked for it."""
    pairs = [(a, b) for i, (a, _) in enumerate(found) for j, (_, b) in enumerate(found) if i != j]
    return float(np.mean([any(place in asked for place in places) for asked, places in pairs])) if pairs else 0.0


def frame(bins: Sequence[Bin], grid: Grid, side: int) -> list[Box]:
    """One box around all of the bins."""
    columns, rows = zip(*bins, strict=True)
    wide, high = side / grid.columns, side / grid.rows
    return [(min(columns) * wide, min(rows) * high, (max(columns) + 1) * wide, (max(rows) + 1) * high)]


def told_localisation(found: Looks) -> dict[str, Any]:
    where = found.where
    return {
        "auroc": where.auroc.as_dict(),
        "lift": where.lift.as_dict(),
        "pointing": where.pointing.as_dict(),
        "count": where.pointing.count,
    }


def told_controllability(found: Controllability) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if np.isnan(value) else value

    return {
        "phi": number(found.phi),
        "low": number(found.low),
        "high": number(found.high),
        "p_value": number(found.p_value),
        "without_word": found.without_word.as_dict(),
        "with_word": found.with_word.as_dict(),
        "verdict": found.verdict,
    }
