# SPDX-License-Identifier: Apache-2.0
"""The parts of an evaluation: the model as it was, one that never saw the concept, and the erased one.

All draw from the same prompts and seeds. Nothing here reads or writes files but the adapter that is applied: `Study` is
made of tensors, detectors and settings, so that a recipe can use it as well as the command.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.jobs.erase.arms import Arm, Judges, Subject, drawn, fitting_policies
from anabranch.jobs.erase.attacks import (
    NEEDS_CONCEPT,
    NEEDS_HARMLESS,
    Attacked,
    Material,
    Plan,
    attack,
)
from anabranch.jobs.erase.diagnose import (
    Control,
    Looks,
    looks_after,
    looks_before,
    positive_control,
    usable,
    word_control,
)
from anabranch.jobs.erase.known import Known, captions_or, spread_rows
from anabranch.jobs.erase.sample import Sampling
from anabranch.measure.concept_ratio import Rate, wilson
from anabranch.measure.controllability import Controllability
from anabranch.measure.erasure import Relearning, Verdict, steps_to_half, verdict
from anabranch.suppress.detectors.protocol import Box
from anabranch.suppress.geom_erasing.adapter import Applied

LOOKED_AT = 24
"""Pictures with the concept in which attention is measured."""


@dataclass(kw_only=True)
class Study:
    """What is asked of every model, and by whom it is judged."""

    concept: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    how: Sampling
    judges: Judges
    known: Known = field(default_factory=Known)
    attacks: Sequence[str] = ()
    attack_samples: int = 50
    attack_images: int = 16
    plan: Plan = field(default_factory=Plan)
    ladder: bool = True
    no_op: str = ""
    word_as_negative: bool = True
    """False of a model without guidance, where a negative prompt does nothing."""
    note: Callable[[str, Arm | None], None] = lambda what, arm: None
    """Told of every finished piece of work."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not measured, and why."""

    def draw(self, name: str, subject: Subject, *, quality: bool = True) -> Arm:
        arm = drawn(subject, self.prompts, self.seeds, self.judges, quality=quality)
        self.note(name, arm)
        return arm

    def attacked(self, names: Sequence[str], subject: Subject, material: Material) -> Attacked:
        """`names` on the first prompts and seeds."""
        few = slice(self.attack_samples)
        return attack(
            names, subject, self.prompts[few], self.seeds[few], self.judges, material, self.concept, self.plan,
            lambda line: self.note(line, None),
        )  # fmt: skip


@dataclass(kw_only=True)
class Before:
    """The model as it was."""

    arms: dict[str, Arm]
    words: Controllability
    looks: Looks | None
    pictures: Tensor
    """With the concept: where attention is measured."""
    boxes: list[list[Box]]
    asked: list[str]
    material: Material
    possible: list[str]
    """Attacks that there is material for."""
    attacked: Attacked


@dataclass(kw_only=True)
class After:
    """The erased model."""

    arms: dict[str, Arm]
    """`erased` and every policy that fits."""
    policy: str
    unfit: dict[str, str]
    control: Control | None
    looks: tuple[Looks, Looks] | None
    """Of the learnt name, and of the name with its places."""
    attacked: Attacked


@dataclass(kw_only=True)
class Never:
    """A model that never saw the concept."""

    arm: Arm
    attacked: Attacked


def study_before(study: Study, pipe: Any) -> Before:
    subject = Subject(pipe=pipe, how=study.how)
    pixels = subject.draw(study.prompts, study.seeds)
    before = study.judges.arm(pixels, study.prompts, quality=True)
    study.note("before", before)
    arms = {"before": before}
    if study.word_as_negative:
        arms["word"] = study.draw("word", Subject(pipe=pipe, how=study.how, negative=study.concept))
    else:
        study.skipped["word as negative prompt"] = "a negative prompt does nothing without guidance"
    arms["no-op"] = study.draw("no-op", Subject(pipe=pipe, how=study.how, negative=study.no_op), quality=False)
    words, arms["asked"] = word_control(
        before.seen.hits, subject, study.prompts, study.seeds, study.judges, study.concept
    )
    study.note("word asked for", arms["asked"])
    rows = np.flatnonzero(before.seen.hits).tolist()
    own = (pixels[rows], [before.seen.boxes[i] for i in rows], [study.prompts[i] for i in rows])
    pictures, boxes, asked = where_known(study, *own)
    looks = None
    if len(pictures):
        looks = looks_before(pipe, asked, pictures, boxes, study.concept)
    material = gather(study, *own)
    possible = feasible(study, material)
    return Before(
        arms=arms, words=words, looks=looks, pictures=pictures, boxes=boxes, asked=asked, material=material,
        possible=possible, attacked=study.attacked(possible, subject, material),
    )  # fmt: skip


def where_known(
    study: Study, pixels: Tensor, boxes: Sequence[list[Box]], prompts: Sequence[str]
) -> tuple[Tensor, list[list[Box]], list[str]]:
    """Pictures whose place of the concept is known: the model's own, else labelled ones."""
    if not any(boxes) and study.known.positives is not None:
        pixels, boxes = study.known.positives, study.known.boxes
        prompts = captions_or(study.known.captions, study.prompts)
    rows = usable(boxes, pixels.shape[-1]) if len(pixels) else []
    rows = [rows[i] for i in spread_rows(len(rows), LOOKED_AT)] if rows else []
    if not rows:
        study.skipped["attention (D2)"] = "no picture with the concept in a known part of it"
    return pixels[rows], [list(boxes[i]) for i in rows], [prompts[i] for i in rows]


def gather(study: Study, pixels: Tensor, boxes: Sequence[list[Box]], prompts: Sequence[str]) -> Material:
    """What attacks are made from: labelled pictures, else those that the model made itself; clean ones."""
    known, source = study.known, "labelled pictures"
    captions: Sequence[str] = prompts
    if known.positives is not None:
        pixels, boxes, captions = known.positives, known.boxes, captions_or(known.captions, study.prompts)
    else:
        source = "the model's own pictures in which the detector found the concept"
    rows = spread_rows(len(pixels), study.attack_images).tolist() if len(pixels) else []
    harmless, harmless_captions = known.harmless, known.harmless_captions
    if harmless is None:
        harmless, harmless_captions = known.clean, known.clean_captions
    if harmless is None:
        harmless, harmless_captions = pixels[:0], ()
    few = spread_rows(len(harmless), study.attack_images).tolist() if len(harmless) else []
    return Material(
        pixels=pixels[rows],
        boxes=[list(boxes[i]) for i in rows],
        captions=[captions[i] for i in rows],
        harmless=harmless[few],
        harmless_captions=captions_or([harmless_captions[i] for i in few], study.prompts),
        source=source,
    )


def feasible(study: Study, material: Material) -> list[str]:
    """The chosen attacks that there are pictures for; the others are noted with the reason."""
    for name in study.attacks:
        if name in NEEDS_CONCEPT and not len(material.pixels):
            study.skipped[f"attack {name}"] = "no picture with the concept: give labels, or draw more samples"
        if name in NEEDS_HARMLESS and not len(material.harmless):
            study.skipped[f"attack {name}"] = "no harmless pictures: give --clean"
    return [name for name in study.attacks if f"attack {name}" not in study.skipped]


def study_never(study: Study, pipe: Any, before: Before) -> Never:
    subject = Subject(pipe=pipe, how=study.how)
    arm = study.draw("never", subject)
    return Never(arm=arm, attacked=study.attacked(before.possible, subject, before.material))


def study_after(study: Study, applied: Applied, before: Before, policy: str | None = None) -> After:
    """The adapter is in its pipeline, and stays there."""
    own = policy or applied.policy
    fit, unfit = fitting_policies(applied, study.judges.detector)
    if own not in fit:
        raise UsageError(f"policy {own} cannot be followed: {unfit.get(own, 'there is no such policy')}")
    asks = applied.attached is not None and bool(applied.adapter.training_bins)
    wanted = [p for p in fit if study.ladder or p == own or (p == "none" and asks)]
    arms: dict[str, Arm] = {}
    for name in wanted:
        subject = Subject(
            pipe=applied.pipe, how=study.how, applied=applied, policy=name, detector=study.judges.detector
        )
        try:
            arms[name] = study.draw(f"policy {name}", subject)
        except UsageError as error:
            if name == own:
                raise
            unfit[name] = error.what
    control, looked = None, None
    if asks:
        control = positive_control(
            applied, arms["none"].seen.hits, study.prompts, study.seeds, study.how, study.judges, study.plan.seed
        )
        study.note("positive control", control.arm)
        if len(before.pictures):
            looked = looks_after(applied, before.asked, before.pictures, before.boxes)
    else:
        why = "the adapter has no words of its own" if applied.attached is None else "it was trained without places"
        study.skipped["positive control, and D1 and D2 of the learnt words"] = why
    subject = Subject(pipe=applied.pipe, how=study.how, applied=applied, policy=own, detector=study.judges.detector)
    return After(
        arms={"erased": arms[own], **arms}, policy=own, unfit=unfit, control=control, looks=looked,
        attacked=study.attacked(before.possible, subject, before.material),
    )  # fmt: skip


def floor_of(study: Study, never: Never | None, alarms: tuple[int, int] | None) -> Rate:
    """The rate of a model that never saw the concept, as near as it is known."""
    if never is not None:
        return never.arm.seen.rate
    if alarms is not None:
        study.skipped["floor"] = "no --never: the detector's false alarms on clean pictures stand for it"
        return wilson(*alarms)
    study.skipped["floor"] = "neither --never nor --clean: counted from zero"
    return Rate(0.0, 0.0, 1.0, 0, 0)


def judged(study: Study, before: Before, after: After, never: Never | None, floor: Rate) -> Verdict:
    """measure.erasure's verdict on all of it."""
    start = before.arms["before"].seen
    relearning = None
    if "relearn" in after.attacked.curves and start.rate.rate > 0:
        relearning = Relearning(
            erased=halves(after.attacked, start.rate.rate),
            never_saw=halves(never.attacked, start.rate.rate) if never is not None else [],
        )
    return verdict(
        start.hits,
        after.arms["erased"].seen.hits,
        attacks={name: arm.seen.rate for name, arm in after.attacked.arms.items() if name != "relearn"},
        floor=floor,
        floors={} if never is None else {name: arm.seen.rate for name, arm in never.attacked.arms.items()},
        no_op=before.arms["no-op"].seen.hits,
        relearning=relearning,
        inapplicable=("bypass",),
    )


def halves(attacked: Attacked, original: float) -> list[float | None]:
    """Steps to half of the original rate, a seed each."""
    return [
        steps_to_half([(step, rate.rate) for step, rate in curve], original) for curve in attacked.curves["relearn"]
    ]
