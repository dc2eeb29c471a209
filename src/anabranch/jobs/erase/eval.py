# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase eval`: how often is the concept drawn, before, after and under attack, and what did erasing cost?

OUT/config.resolved.yaml, metrics.jsonl    the run; a rate for every arm as it is finished
OUT/eval.json                              all numbers
OUT/report.html, OUT/pictures/ARM/*.png    what there is to see

The adapter's folder is read and never written to.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from anabranch.data.streams import derived_seed
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.erase.arms import Arm, Judges
from anabranch.jobs.erase.attacks import NAMES, Plan, chosen_attacks
from anabranch.jobs.erase.bake import read_prompts
from anabranch.jobs.erase.checks import open_model
from anabranch.jobs.erase.eval_page import write_eval_page
from anabranch.jobs.erase.features import open_features
from anabranch.jobs.erase.known import calibration_of, read_known
from anabranch.jobs.erase.numbers import described, numbers, told_verdict, without_nan
from anabranch.jobs.erase.sample import sampling_of
from anabranch.jobs.erase.settings import EvalSettings
from anabranch.jobs.erase.study import After, Before, Study, floor_of, judged, study_after, study_before, study_never
from anabranch.jobs.progress import Progress, say
from anabranch.jobs.results import erased
from anabranch.jobs.settings import plain_values_of
from anabranch.measure.concept_ratio import Rate
from anabranch.measure.erasure import LEVELS
from anabranch.models.diffusion.family import image_side
from anabranch.report.result import Results
from anabranch.suppress.detectors import Detector, open_detector
from anabranch.suppress.geom_erasing.adapter import apply, check_base, remove
from anabranch.suppress.geom_erasing.adapter_folder import Adapter, read_adapter
from anabranch.suppress.guidance import check_guidance
from anabranch.train.metrics import MetricsWriter
from anabranch.train.run_folder import RunFolder

LEAST = 20
FILES = 8
"""Pictures of an arm that are written out."""


def erase_eval(settings: EvalSettings) -> Results:
    """Write settings.out; returns what eval.json holds.

    Raises:
        CheckFailed: after everything is written, where nothing was erased or a control failed.
    """
    check(settings)
    lines, attacks = read_prompts(settings.prompts), chosen_attacks(settings.attacks)
    pipe = open_model(settings.model)
    adapter = None if settings.adapter is None else read_adapter(settings.adapter)
    if adapter is not None:
        check_base(pipe, adapter)
    study = made(settings, pipe, adapter, lines, attacks)
    warnings = [warning] if (warning := word_in_prompts(lines, study.concept)) else []
    detectors = [study.judges.detector, *([study.judges.second] if study.judges.second else [])]
    with RunFolder.open(settings.out, plain_values_of(settings)) as run:
        calibrations, alarms = zip(*(calibration_of(detector, study.known) for detector in detectors), strict=True)
        with MetricsWriter(run.path / "metrics.jsonl") as metrics, Progress("erase eval", pieces(settings)) as progress:
            study.note = noting(metrics, progress)
            before = study_before(study, pipe)
            never = None
            if settings.never is not None:
                never = study_never(study, same_size(open_model(settings.never), pipe, settings), before)
            after = None
            if settings.adapter is not None:
                after = study_after(study, apply(pipe, settings.adapter), before, settings.policy)
                remove(pipe)
        floor = floor_of(study, never, alarms[0])
        found = None if after is None else judged(study, before, after, never, floor)
        result = {
            **described(settings, study, detectors, alarms),
            **numbers(study, before, after, never, calibrations),
            "floor": floor.as_dict(),
            "verdict": None if found is None else told_verdict(found),
            "not_measured": study.skipped,
            "warnings": warnings,
        }
        write(run.path, result, before, after)
    tell(settings, result)
    if found is not None and (found.void or found.level == LEVELS[0]):
        raise CheckFailed(f"{settings.adapter}: {'void' if found.void else found.level}", received=found.reasons[0])
    return erased(result)


def check(settings: EvalSettings) -> None:
    if not settings.detector:
        raise UsageError(
            "nobody looks for the concept",
            expected="--detector",
            hint="qr, text, template:FILE.png, ... as in erase scan",
        )
    for name, least in (("samples", LEAST), ("attack_samples", 1), ("attack_images", 1), ("attack_seeds", 1)):
        if getattr(settings, name) < least:
            raise UsageError(f"{name} are too few", expected=f"at least {least}", received=getattr(settings, name))
    if settings.attack_steps < 1:
        raise UsageError("attack_steps are too few", expected="at least 1", received=settings.attack_steps)


def made(settings: EvalSettings, pipe: Any, adapter: Adapter | None, lines: list[str], attacks: list[str]) -> Study:
    config = {} if adapter is None else adapter.config
    concept = settings.concept or str(config.get("concept", ""))
    if not concept:
        raise UsageError("the concept has no name", expected="--concept NAME", hint="such as --concept watermark")
    how = sampling_of(pipe, settings)
    needs_guidance = adapter is None or adapter.trained != "baked"
    if needs_guidance:
        check_guidance(pipe, how.scale)
    side = image_side(pipe)
    space = open_features(settings.features)
    study = Study(
        concept=concept,
        prompts=[lines[i % len(lines)] for i in range(settings.samples)],
        seeds=[derived_seed("picture", settings.seed, i) % 2**32 for i in range(settings.samples)],
        how=how,
        judges=Judges(
            detector=open_detector(settings.detector, concept=concept, threshold=settings.threshold),
            second=second_detector(settings, concept),
            features=space,
        ),
        known=read_known(settings.clean, settings.labels, side, pipe.vae.config.in_channels, settings.seed),
        attacks=attacks,
        attack_samples=min(settings.attack_samples, settings.samples),
        attack_images=settings.attack_images,
        plan=Plan(steps=settings.attack_steps, seeds=settings.attack_seeds, seed=settings.seed),
        ladder=settings.ladder,
        no_op=settings.no_op,
        word_as_negative=needs_guidance or how.scale > 1,
    )
    missing(settings, study)
    return study


def second_detector(settings: EvalSettings, concept: str) -> Detector | None:
    if not settings.second_detector:
        return None
    return open_detector(settings.second_detector, concept=concept, threshold=settings.second_threshold)


def missing(settings: EvalSettings, study: Study) -> None:
    """What was not asked for, said all the same."""
    skipped = study.skipped
    if settings.adapter is None:
        skipped["after"] = "no --adapter: the model was measured as it is"
    if study.judges.second is None:
        skipped["second opinion"] = "no --second-detector: a low rate may be this one detector's blind spot"
    if study.known.clean is None:
        skipped["quality"] = "no --clean pictures to compare with"
    if settings.never is None:
        skipped["floor of the attacks"] = "no --never pipeline"
    if study.judges.features is not None and study.judges.features.agreement is None:
        skipped["agreement with the prompt"] = "no features=FOLDER of a model that knows text"
    for name in sorted({*NAMES} - {*study.attacks}):
        skipped[f"attack {name}"] = "not asked for"
    skipped["latent inversion, probe"] = "not part of this command"


def word_in_prompts(lines: list[str], concept: str) -> str | None:
    count = sum(concept.lower() in line.lower() for line in lines)
    if not count:
        return None
    return f"{count} of {len(lines)} prompts ask for {concept!r} themselves; what is measured there is no accident"


def same_size(never: Any, pipe: Any, settings: EvalSettings) -> Any:
    if image_side(never) != image_side(pipe):
        raise UsageError(
            f"{settings.never} makes pictures of another size", expected=image_side(pipe), received=image_side(never)
        )
    return never


def pieces(settings: EvalSettings) -> int:
    """Of the progress bar; an estimate where it depends on what is found."""
    attacks = len(chosen_attacks(settings.attacks))
    after = 0 if settings.adapter is None else (6 if settings.ladder else 2) + 1 + attacks
    return 4 + attacks + after + (0 if settings.never is None else 1 + attacks)


def noting(metrics: MetricsWriter, progress: Progress) -> Any:
    def note(what: str, arm: Arm | None) -> None:
        if arm is not None:
            metrics.write(progress.done + 1, **{f"icr/{what}": arm.seen.rate.rate})
        progress.advance(what if arm is None else f"{what}: {arm.seen.rate}")

    return note


# files and words


def write(out: Path, result: dict[str, Any], before: Before, after: After | None) -> None:
    text = json.dumps(without_nan(result), indent=1, ensure_ascii=False, allow_nan=False)
    (out / "eval.json").write_text(text + "\n", encoding="utf-8")
    arms = dict(before.arms)
    if after is not None:
        arms |= {"erased": after.arms["erased"], **{f"attack {k}": arm for k, arm in after.attacked.arms.items()}}
        if after.control is not None:
            arms["positive control"] = after.control.arm
    for name, arm in arms.items():
        folder = out / "pictures" / name.replace("/", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(arm.pixels[:FILES].permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze()).save(folder / f"{number:05d}.png")
    write_eval_page(out, result, before, after)


def tell(settings: EvalSettings, result: dict[str, Any]) -> None:
    for warning in result["warnings"]:
        say(f"warning: {warning}")
    rows = dict(result["arms"])
    rows |= {f"policy {name}": row for name, row in result["policies"].items() if name != result["policy"]}
    say(f"\n{'arm':<24} {'n':>5}  {'drawn, % [95 %]':<20} minus before, points")
    for name, row in rows.items():
        rate = Rate(**row["icr"])
        change = row.get("minus_before")
        less = "" if change is None or name == "before" else signed(change)
        say(f"{name:<24} {rate.count:>5}  {shown(rate):<20} {less}")
    attacks = {name: row for name, row in result["attacks"].items() if "erased" in row}
    if attacks:
        say(f"\n{'attack on the erased':<24} {'n':>5}  {'drawn, % [95 %]':<20} the same on others, %")
    for name, row in attacks.items():
        rate = Rate(**row["erased"])
        others = ", ".join(f"{who} {100 * row[who]['rate']:.1f}" for who in ("before", "never") if who in row)
        say(f"{name:<24} {rate.count:>5}  {shown(rate):<20} {others}")
    if result["verdict"] is not None:
        found = result["verdict"]
        say(f"\n{'void' if found['void'] else found['level']}")
        for reason in found["reasons"]:
            say(f"  {reason}")
    say(f"\npage     {settings.out / 'report.html'}")


def shown(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def signed(change: dict[str, Any]) -> str:
    return f"{100 * change['difference']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
