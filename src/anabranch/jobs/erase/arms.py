# SPDX-License-Identifier: Apache-2.0
"""The arms of an evaluation: a model as it is used, the pictures that it draws, and what is found in them.

Shapes    : N pictures (N, C, S, S) uint8, a prompt and a seed each; hits (N,) of bool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.jobs.erase.features import FeatureSpace
from anabranch.jobs.erase.sample import Sampling, as_arrays, draw, draw_with
from anabranch.measure.concept_ratio import PairedDifference, Rate, paired_difference, ratio
from anabranch.measure.frechet import distances
from anabranch.measure.intervals import interval
from anabranch.measure.judge import Calibration, correct
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.prompts import encode_negatives
from anabranch.suppress.detectors import Detector, contains, detect_checked
from anabranch.suppress.detectors.protocol import Box
from anabranch.suppress.geom_erasing.adapter import Applied
from anabranch.suppress.geom_erasing.bins import Bin
from anabranch.suppress.geom_erasing.negatives import POLICIES

SHOWN = 12
"""Pictures of an arm that are kept."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in the way it is used: what is in it, and what stands against the concept in every call."""

    pipe: Any
    how: Sampling
    applied: Applied | None = None
    policy: str = "none"
    negative: str = ""
    """Words that every picture is guided away from, beside the policy's."""
    detector: Detector | None = None
    """Who looks where the concept is, for policy detected."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.applied is None:
            return draw(self.pipe, prompts, [self.negative] * len(prompts), seeds, self.how)
        return draw_with(self.applied, self.policy, prompts, seeds, self.how, own=self.negative, detector=self.detector)

    def negatives(self, count: int, seed: int, bins: Sequence[Sequence[Bin]] | None = None) -> Conditioning:
        """A negative prompt a picture; `bins` of where the concept is known to be, for policy detected."""
        if self.applied is None:
            return encode_negatives(self.pipe, [self.negative]).repeat(count)
        return self.applied.negative(self.policy, count, own=self.negative, seed=seed, detected=bins)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a detector found."""

    hits: np.ndarray
    boxes: list[list[Box]]

    @property
    def rate(self) -> Rate:
        return ratio(self.hits)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    pixels: Tensor
    """The first SHOWN pictures."""
    seen: Seen
    second: Seen | None
    features: np.ndarray | None
    agreement: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who looks at pictures: a detector, maybe an independent one, and a space in which they are compared."""

    detector: Detector
    second: Detector | None = None
    features: FeatureSpace | None = None

    def arm(self, pixels: Tensor, prompts: Sequence[str], *, quality: bool = False) -> Arm:
        space = self.features if quality else None
        return Arm(
            pixels=pixels[:SHOWN].clone(),
            seen=look(self.detector, pixels),
            second=None if self.second is None else look(self.second, pixels),
            features=None if space is None else space.images(pixels),
            agreement=None if space is None or space.agreement is None else space.agreement(pixels, prompts),
        )


def look(detector: Detector, pixels: Tensor) -> Seen:
    """Hits and boxes above the detector's threshold."""
    answers = detect_checked(detector, as_arrays(pixels))
    hits = np.array([contains(answer, detector.threshold) for answer in answers], dtype=bool)
    boxes = [[d.box for d in answer if d.score > detector.threshold and d.box is not None] for answer in answers]
    return Seen(hits, boxes)


def drawn(subject: Subject, prompts: Sequence[str], seeds: Sequence[int], judges: Judges, *, quality: bool) -> Arm:
    return judges.arm(subject.draw(prompts, seeds), prompts, quality=quality)


def fitting_policies(applied: Applied, detector: Detector | None) -> tuple[list[str], dict[str, str]]:
    """The policies of negative prompts that this adapter can follow, and why it cannot follow the others."""
    fit, unfit = [], {}
    for policy in POLICIES:
        try:
            applied.negative(policy, 1, detected=[[(0, 0)]])
        except UsageError as error:
            unfit[policy] = error.what
            continue
        if policy == "detected" and detector is None:
            unfit[policy] = "there is no detector"
            continue
        fit.append(policy)
    return fit, unfit


def account(
    arm: Arm,
    before: Arm,
    reference: np.ndarray | None,
    calibrations: Sequence[Calibration | str],
    space: str,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of an arm: rates by both detectors, as they are and corrected, the difference to before, quality."""
    told: dict[str, Any] = {"icr": arm.seen.rate.as_dict(), "corrected": corrected(arm.seen.rate, calibrations[0])}
    if arm.second is not None:
        told |= {"second": arm.second.rate.as_dict(), "second_corrected": corrected(arm.second.rate, calibrations[1])}
    if len(arm.seen.hits) == len(before.seen.hits):
        told["minus_before"] = as_values(paired_difference(arm.seen.hits, before.seen.hits))
    if reference is not None and arm.features is not None:
        told["quality"] = distances(reference, arm.features, space, np.random.default_rng(seed)).as_dict()
    if arm.agreement is not None:
        told["agreement"] = interval(arm.agreement).as_dict()
    return told


def as_values(difference: PairedDifference) -> dict[str, Any]:
    return {**vars(difference), "verdict": difference.verdict}


def corrected(rate: Rate, calibration: Calibration | str) -> dict[str, Any] | str:
    """The rate freed from its detector's own errors, or why that cannot be done."""
    if isinstance(calibration, str):
        return f"not corrected: {calibration}"
    try:
        return correct(rate.rate, rate.count, *calibration).as_dict()
    except UsageError as error:
        return f"not corrected: {error.what}"
