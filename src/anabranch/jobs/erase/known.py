# SPDX-License-Identifier: Apache-2.0
"""Real pictures of which something is known: clean ones, and labelled ones with and without the concept.

They say what a detector's rate is worth, what quality is compared with, and what attacks are made from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anabranch.data.captions import read_captions
from anabranch.data.folders import decode_into, list_folder, refuse_too_many
from anabranch.data.images import allocate
from anabranch.data.labels import read_labels
from anabranch.data.streams import derived_seed
from anabranch.jobs.erase.arms import look
from anabranch.jobs.erase.train import boxes_in_square
from anabranch.measure.judge import Calibration
from anabranch.suppress.detectors import Detector
from anabranch.suppress.detectors.protocol import Box

MOST_CLEAN, MOST_LABELLED = 2048, 512
"""Pictures that are read; a larger folder is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Known:
    clean: Tensor | None = None
    clean_captions: tuple[str, ...] = ()
    positives: Tensor | None = None
    """With the concept, by the labels."""
    boxes: tuple[list[Box], ...] = ()
    captions: tuple[str, ...] = ()
    harmless: Tensor | None = None
    """Of the labelled pictures those without it."""
    harmless_captions: tuple[str, ...] = ()
    labelled_by: str = ""


def read_known(clean: Path | None, labels: Path | None, side: int, channels: int, seed: int) -> Known:
    found: dict[str, object] = {}
    if clean is not None:
        listing = list_folder(clean)
        files = some(listing.files, MOST_CLEAN, seed)
        pixels, files = decoded(listing.root, files, side, channels)
        found |= {"clean": pixels, "clean_captions": tuple(read_captions(listing.root, files))}
    if labels is not None:
        read = read_labels(labels)
        squares = {row.file: boxes_in_square(row, side) for row in read.rows}
        with_it = [file for file, boxes in squares.items() if boxes is not None]
        without = [file for file, boxes in squares.items() if boxes is None]
        found["labelled_by"] = read.detector
        for name, caption_name, files in (
            ("positives", "captions", with_it),
            ("harmless", "harmless_captions", without),
        ):
            if files:
                pixels, files = decoded(read.root, some(files, MOST_LABELLED, seed), side, channels)
                found |= {name: pixels, caption_name: tuple(read_captions(read.root, files))}
                if name == "positives":
                    found["boxes"] = tuple(squares[file] for file in files)
    return Known(**found)


def some(files: Sequence[str], most: int, seed: int) -> list[str]:
    """At most so many, in their order."""
    if len(files) <= most:
        return list(files)
    generator = torch.Generator().manual_seed(derived_seed("known pictures", seed))
    return [files[i] for i in sorted(torch.randperm(len(files), generator=generator)[:most].tolist())]


def decoded(root: Path, files: list[str], side: int, channels: int) -> tuple[Tensor, list[str]]:
    """(N, C, S, S) uint8 of the files that can be read, and their names."""
    result = decode_into(allocate((len(files), channels, side, side)), root, files, None)
    refuse_too_many(root, tuple(result.bad.values()), len(files))
    good = [i for i in range(len(files)) if i not in result.bad]
    return result.pixels[good], [files[i] for i in good]


def calibration_of(detector: Detector, known: Known) -> tuple[Calibration | str, tuple[int, int] | None]:
    """(what the detector does on known cases or why that is not known, false alarms (hits, of) on clean pictures)."""
    alarms = None
    if known.clean is not None:
        hits = look(detector, known.clean).hits
        alarms = (int(hits.sum()), len(hits))
    if alarms is None:
        return "no clean pictures to count false alarms on", None
    if known.positives is None:
        return "no labelled pictures with the concept to count misses on", alarms
    if known.labelled_by == detector.name:
        return "the labels are this detector's own, so that its misses are not known", alarms
    hits = look(detector, known.positives).hits
    return Calibration((int(hits.sum()), len(hits)), (alarms[1] - alarms[0], alarms[1])), alarms


def captions_or(captions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The captions; prompts in turn where there are none."""
    return [caption or prompts[i % len(prompts)] for i, caption in enumerate(captions)]


def spread_rows(count: int, most: int) -> np.ndarray:
    """At most so many of the rows, evenly over all of them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
