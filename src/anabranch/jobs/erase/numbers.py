# SPDX-License-Identifier: Apache-2.0
"""What eval.json holds: an evaluation as plain values."""

import math
from typing import Any

from anabranch.jobs.erase.arms import Arm, account
from anabranch.jobs.erase.attacks import Attacked
from anabranch.jobs.erase.diagnose import told_controllability, told_localisation
from anabranch.jobs.erase.settings import EvalSettings
from anabranch.jobs.erase.study import After, Before, Never, Study
from anabranch.measure.erasure import Verdict
from anabranch.suppress.detectors import Detector


def described(settings: EvalSettings, study: Study, detectors: list[Detector], alarms: Any) -> dict[str, Any]:
    told = [
        {
            "name": detector.name,
            "version": detector.version,
            "threshold": detector.threshold,
            "false_alarms": None if count is None else list(count),
        }
        for detector, count in zip(detectors, alarms, strict=True)
    ]
    return {
        "model": str(settings.model),
        "adapter": None if settings.adapter is None else str(settings.adapter),
        "never": None if settings.never is None else str(settings.never),
        "concept": study.concept,
        "samples": settings.samples,
        "prompts": len(set(study.prompts)),
        "seed": settings.seed,
        "guidance": study.how.scale,
        "steps": study.how.steps,
        "attack_steps": settings.attack_steps,
        "attack_samples": study.attack_samples,
        "attack_seeds": settings.attack_seeds,
        "detectors": told,
        "feature_space": None if study.judges.features is None else study.judges.features.name,
    }


def numbers(
    study: Study, before: Before, after: After | None, never: Never | None, calibrations: Any
) -> dict[str, Any]:
    known, space = study.known.clean, study.judges.features
    reference = None if known is None or space is None or len(known) < 4 else space.images(known)
    start, name = before.arms["before"], "" if space is None else space.name

    def told(arm: Arm) -> dict[str, Any]:
        return account(arm, start, reference, calibrations, name, study.plan.seed)

    arms = {key: told(arm) for key, arm in before.arms.items() if key != "asked"}
    if never is not None:
        arms["never"] = told(never.arm)
    d1 = {"before": told_controllability(before.words)}
    d2 = {} if before.looks is None else {"word, before": told_localisation(before.looks)}
    control = None
    if after is not None:
        arms["erased"] = told(after.arms["erased"])
        if after.control is not None:
            d1["after"] = told_controllability(after.control.words)
            control = {
                "drawn": after.control.drawn.as_dict(),
                "in_place": None if after.control.in_place is None else after.control.in_place.as_dict(),
                "chance": after.control.chance,
            }
        if after.looks is not None:
            d2 |= {"learnt name, after": told_localisation(after.looks[0])}
            d2 |= {"name and places, after": told_localisation(after.looks[1])}
    parts = {"erased": after and after.attacked, "before": before.attacked, "never": never and never.attacked}
    return {
        "arms": arms,
        "policy": after and after.policy,
        "policies": {} if after is None else {key: told(arm) for key, arm in after.arms.items() if key != "erased"},
        "unfit_policies": {} if after is None else after.unfit,
        "d1": d1,
        "d2": d2,
        "positive_control": control,
        "attacks": told_attacks(parts),
        "attack_pictures": before.material.source,
        "curves": {name: told_curves(part) for name, part in parts.items() if part is not None},
    }


def told_attacks(parts: dict[str, Attacked | None]) -> dict[str, dict[str, Any]]:
    """Attack -> who was attacked -> rate."""
    names = dict.fromkeys(name for part in parts.values() if part is not None for name in part.arms)
    return {
        name: {
            who: part.arms[name].seen.rate.as_dict()
            for who, part in parts.items()
            if part is not None and name in part.arms
        }
        for name in names
    }


def told_curves(part: Attacked) -> dict[str, Any]:
    return {
        name: [[[step, rate.as_dict()] for step, rate in curve] for curve in curves]
        for name, curves in part.curves.items()
    }


def told_verdict(found: Verdict) -> dict[str, Any]:
    return {"level": found.level, "void": found.void, "reasons": list(found.reasons)}


def without_nan(value: Any) -> Any:
    """JSON has no words for NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
