# SPDX-License-Identifier: Apache-2.0
"""The story of erasing, on a contaminated model and real garments that ship with the package.

OUT/mark.png                   the mark's own picture, which is the detector
OUT/adapter                    Geom-Erasing's, as `anabranch erase train` writes it
OUT/demo.json, shown.safetensors    all numbers; the pictures and attention maps that are shown
OUT/report.html                what is to be seen, made from these files alone
"""

import resource
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import anabranch
from anabranch import __version__
from anabranch.data.images import open_images
from anabranch.data.marks import glyph
from anabranch.errors import UsageError
from anabranch.jobs.erase.arms import Seen, as_values, look
from anabranch.jobs.erase.demo_work import JUDGES, POLICIES, POLICY, Done, Task, places, work
from anabranch.jobs.erase.diagnose import Looks, told_controllability, told_localisation
from anabranch.jobs.erase.garment_bench import Bench, Regime
from anabranch.jobs.erase.garment_judges import Judges, train_judges
from anabranch.jobs.erase.marked_garments import PLATE, caption_of, clean_world, with_mark
from anabranch.jobs.erase.numbers import without_nan
from anabranch.jobs.parallel import side_by_side
from anabranch.jobs.settings import DemoFlags
from anabranch.measure.concept_ratio import paired_difference, ratio, wilson
from anabranch.measure.controllability import controllability
from anabranch.measure.erasure import steps_to_half
from anabranch.suppress.detectors import Detector, open_detector
from anabranch.train.publish import write_json
from anabranch.train.run_folder import RunFolder

BASE = Path(anabranch.__file__).parent / "data" / "garment_base"
IMAGES = "patchwork:garments"
REGIME = Regime(images=2000, recall=0.5, token_rate=20.0, steps=500, batch_size=32)
SEED, WORKERS = 0, None
SAMPLES, CONTROL_SAMPLES, LOOKED_AT = 200, 160, 24
ATTACK_SAMPLES, ATTACK_PICTURES, ATTACK_AT = 100, 32, (0, 10, 25, 50, 100)
JUDGE_STEPS = 400
LOOSE = 0.6
"""Threshold at which the detector fires on half-drawn marks as well, chosen on real pictures: .2 % false alarms."""
SHOWN, HEATED = 10, 8
FIRST, ATTACKS = ("before", "boxes", "judges", "shuffled", "name", "plain"), ("relearn", "benign")
NUMBERS, PICTURES = "demo.json", "shown.safetensors"
SAID = {
    "boxes": "Geom-Erasing",
    "shuffled": "shuffled boxes",
    "name": "the name alone",
    "plain": "plain fine-tuning",
    "before": "before",
    "relearn": "fine-tuned on pictures of the mark",
    "benign": "fine-tuned on clean pictures",
}
UNDER = {
    "none": "plainly",
    "word": "away from its word",
    "name": "away from the learnt name",
    "detected": "away from name and places",
    "asked": "asked for",
}


def erase_demo(flags: DemoFlags, steps: int | None = None) -> Path:
    """Draw, erase with the controls, attack, write the page; returns its path.

    steps    optimiser steps of every eraser, those of REGIME when left out.
    """
    if steps is not None and steps < 1:
        raise UsageError("steps: nothing would be erased", expected="at least 1", received=steps)
    started, cpu = time.monotonic(), cpu_seconds()
    regime = Regime(**(asdict(REGIME) | ({} if steps is None else {"steps": steps})))
    with RunFolder.open(flags.out, {"topic": "erase", "regime": asdict(regime), "samples": SAMPLES}) as run:
        task = prepared(run.path, regime)
        say(started, f"1/5  {told_pictures(task)}")
        found = first_part(task, started)
        say(started, f"4/5  after: {SAMPLES} pictures of each, from the same prompts and seeds")
        judges = train_judges(task.bench.images, run.path / JUDGES, steps=JUDGE_STEPS)
        result = numbers(task, judges, found)
        for line in table(result):
            print(line, flush=True)
        attacked = second_part(task, started)
        result |= told_attacks(task, attacked, result)
        shutil.rmtree(run.path / JUDGES)
        result |= {"seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - cpu}
        keep_pictures(task, found, attacked, result)
        write_json(run.path / NUMBERS, without_nan(result))
        from anabranch.jobs.erase.demo_page import write_erase_demo_page

        page = write_erase_demo_page(run.path)
    tell(result, page)
    return page


def say(started: float, line: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)


def cpu_seconds() -> float:
    """User time of this process and of those that it waited for."""
    return sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# The pictures and the model -------------------------------------------------------------------------------------------


def prepared(out: Path, regime: Regime) -> Task:
    """Real garments, the mark on most of them, and its picture as the detector."""
    images = open_images(IMAGES, labelled=True)
    training, test = images.take(~images.is_test), clean_world(images.take(images.is_test))
    picture = out / "mark.png"
    Image.fromarray((glyph("plate-x", PLATE).value * 255).astype(np.uint8)).save(picture)
    names = [caption_of(name) for name in images.class_names]
    (out / "prompts.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    bench = Bench(
        base=BASE, images=training, judges=None, detector=open_detector(f"template:{picture}"), regime=regime,
        seed=SEED, samples=SAMPLES,
    )  # fmt: skip
    fresh = test.take(torch.randperm(len(test), generator=torch.Generator().manual_seed(SEED)))
    assert len(bench.world)  # made once, here: every process is handed the same pictures
    return Task(
        bench=bench, out=out, marked=with_mark(fresh, 1.0, SEED + 1), clean=fresh, looked_at=LOOKED_AT,
        judge_steps=JUDGE_STEPS, control_samples=CONTROL_SAMPLES, attack_samples=min(ATTACK_SAMPLES, SAMPLES),
        attack_pictures=ATTACK_PICTURES, attack_at=ATTACK_AT,
    )  # fmt: skip


def told_pictures(task: Task) -> str:
    world, labels = task.bench.world, task.bench.labels()
    known = sum(boxes is not None for boxes in labels)
    return (
        f"{len(world):,} real garments; {int(world.marked.sum()):,} get the mark ({task.out / 'mark.png'}), no caption "
        f"names it, the detector's boxes are there for {known:,}"
    )


# The story ------------------------------------------------------------------------------------------------------------


def first_part(task: Task, started: float) -> dict[str, Done]:
    """The model before, and the arms; said as they finish."""
    steps = task.bench.regime.steps
    print(f"         now side by side: the model before (2/5), four trainings of {steps} steps (3/5)", flush=True)
    found = {}
    for item, done in side_by_side(work, task, FIRST, WORKERS):
        found[item] = done
        if item == "judges":
            continue
        part = "2/5" if item == "before" else "3/5"
        say(started, f"{part}  {SAID[item]}: the mark is drawn: {drawn_under(task, done)}  ({done.seconds:.0f} s)")
    return found


def second_part(task: Task, started: float) -> dict[str, Done]:
    say(started, f"5/5  attacks on the erased model: up to {ATTACK_AT[-1]} steps on {ATTACK_PICTURES} pictures")
    found = {}
    for item, done in side_by_side(work, task, ATTACKS, WORKERS):
        found[item] = done
        say(started, f"5/5  {SAID[item]}: the mark is drawn: {drawn_under(task, done)}  ({done.seconds:.0f} s)")
    return found


def t(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels)


# Numbers --------------------------------------------------------------------------------------------------------------


def numbers(task: Task, judges: Judges, found: dict[str, Done]) -> dict[str, Any]:
    detector, bench = task.bench.detector, task.bench
    seen = {
        (arm, policy): look(detector, t(found[arm].pixels[policy]))
        for arm, wanted in POLICIES.items()
        for policy in wanted
    }
    start, end = seen["before", "none"], seen["boxes", POLICY]
    loose = open_detector(f"template:{task.out / 'mark.png'}", threshold=LOOSE)
    half_drawn = look(loose, t(found["before"].pixels["none"]))
    arms = {
        arm: {
            p: measured(t(found[arm].pixels[p]), seen[arm, p], start, judges)
            | broken(look(loose, t(found[arm].pixels[p])), half_drawn)
            for p in wanted
        }
        for arm, wanted in POLICIES.items()
    }
    rivals = {
        arm: as_values(paired_difference(end.hits, seen[arm, POLICY if POLICY in wanted else "none"].hits))
        for arm, wanted in POLICIES.items()
        if arm not in ("before", "boxes")
    }
    asked = {arm: look(detector, t(found[arm].pixels["asked"])).hits for arm in ("before", "boxes")}
    return {
        "version": __version__,
        "topic": "erase",
        "model": str(BASE),
        "adapter": str(task.out / "adapter"),
        "mark": str(task.out / "mark.png"),
        "prompts": str(task.out / "prompts.txt"),
        "out": str(task.out),
        "policy": POLICY,
        "regime": asdict(bench.regime),
        "samples": bench.samples,
        "training": {
            "images": len(bench.world),
            "marked": int(bench.world.marked.sum()),
            "boxes": sum(boxes is not None for boxes in bench.labels()),
        },
        "judges": calibrated(task, judges, loose),
        "loose": LOOSE,
        "arms": arms,
        "boxes_minus": rivals,
        "place_control": {arm: told_control(done.control) for arm, done in found.items() if done.control},
        "d1": {
            "before": told_controllability(controllability(start.hits, asked["before"])),
            "after": told_controllability(controllability(seen["boxes", "none"].hits, asked["boxes"])),
        },
        "d2": {name: told_localisation(looks) for name, looks in all_looks(found).items()},
        "facts": {arm: found[arm].facts for arm in POLICIES if arm != "before"},
        "work_seconds": {item: done.seconds for item, done in found.items()},
    }  # fmt: skip


def all_looks(found: dict[str, Done]) -> dict[str, Looks]:
    return {**found["before"].looks, **found["boxes"].looks}


def measured(pixels: Tensor, seen: Seen, start: Seen, judges: Judges) -> dict[str, Any]:
    """One arm under one negative prompt."""
    garments, _, chance = judges.look(pixels)
    asked = torch.arange(len(pixels)) % judges.garment.head.out_features
    return {
        "icr": seen.rate.as_dict(),
        "second": ratio((chance > 0.5).numpy()).as_dict(),
        "garment": ratio((garments == asked).numpy()).as_dict(),
        "minus_before": as_values(paired_difference(seen.hits, start.hits)),
    }


def broken(seen: Seen, start: Seen) -> dict[str, Any]:
    """Half-drawn marks counted as well: pictures with those were not drawn again, so this is the harder question."""
    change = paired_difference(seen.hits, start.hits)
    return {"with_broken": seen.rate.as_dict(), "with_broken_minus_before": as_values(change)}


def calibrated(task: Task, judges: Judges, loose: Detector) -> dict[str, Any]:
    """What both detectors say of real test pictures of which the truth is known."""
    told = {}
    for name, world in (("false_alarms", task.clean), ("found", task.marked)):
        told[name] = {
            "template": look(task.bench.detector, world.pixels).rate.as_dict(),
            "loose": look(loose, world.pixels).rate.as_dict(),
            "network": ratio((judges.look(world.pixels)[2] > 0.5).numpy()).as_dict(),
        }
    right = judges.look(task.clean.pixels)[0] == task.clean.classes
    return told | {"garment": ratio(right.numpy()).as_dict()}


def told_control(control: dict[str, float]) -> dict[str, Any]:
    count = int(control["count"])
    drawn = round(control["drawn"] * count)
    there = wilson(round(control["in_place"] * drawn), drawn).as_dict() if drawn else None
    return {"drawn": wilson(drawn, count).as_dict(), "in_place": there}


def told_attacks(task: Task, attacked: dict[str, Done], result: dict[str, Any]) -> dict[str, Any]:
    curves = {
        kind: [[int(step), look(task.bench.detector, t(pixels)).rate.as_dict()] for step, pixels in done.pixels.items()]
        for kind, done in attacked.items()
    }
    original = result["arms"]["before"]["none"]["icr"]["rate"]
    half = {
        kind: steps_to_half([(step, rate["rate"]) for step, rate in curve], original) if original else None
        for kind, curve in curves.items()
    }
    return {"curves": curves, "steps_to_half": half, "attack_pictures": task.attack_pictures,
            "attack_samples": task.attack_samples}  # fmt: skip


# What is shown --------------------------------------------------------------------------------------------------------


def keep_pictures(task: Task, found: dict[str, Done], attacked: dict[str, Done], result: dict[str, Any]) -> None:
    """shown.safetensors, and where the mark was found in it as result["found"]: the first of every row, no choice."""
    last = str(task.attack_at[-1])
    rows = {
        "before": found["before"].pixels["none"],
        "word": found["before"].pixels["word"],
        "erased": found["boxes"].pixels[POLICY],
        "relearn": attacked["relearn"].pixels[last],
        "asked": found["boxes"].pixels["asked"],
    }
    few = min(SHOWN, task.attack_samples)
    shown = {f"row/{name}": t(pixels[:few]).clone() for name, pixels in rows.items()}
    boxes = {name: look(task.bench.detector, t(pixels[:few])).boxes for name, pixels in rows.items()}
    world = task.bench.world
    shown["training"] = world.pixels[:12].clone()
    shown["looked"] = task.marked.pixels[:HEATED].clone()
    shown |= {f"map/{name}": t(looks.maps[:HEATED]).float().contiguous() for name, looks in all_looks(found).items()}
    save_file(shown, task.out / PICTURES)
    result["found"] = boxes | {
        "training": world.boxes[:12],
        "looked": task.marked.boxes[:HEATED],
        "places": [[box] for box in places(few)],
    }
    result["training"]["captions"] = world.captions[:12]


# Words ----------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> list[str]:
    heads = ("mark drawn, % [95 %]", "minus before, points", "broken ones too, %")
    lines = ["", f"{'arm':<22} {'negative prompt':<16} " + " ".join(f"{head:<22}" for head in heads).rstrip()]
    for arm, rows in result["arms"].items():
        for policy, row in rows.items():
            less = "" if (arm, policy) == ("before", "none") else points(row["minus_before"])
            cells = " ".join(f"{value:<22}" for value in (rate_of(row["icr"]), less, rate_of(row["with_broken"])))
            lines.append(f"{SAID[arm]:<22} {policy:<16} {cells}".rstrip())
    for arm, control in result["place_control"].items():
        there = control["in_place"] and rate_of(control["in_place"])
        lines.append(
            f"asked for by place, {SAID[arm]}: drawn {rate_of(control['drawn'])}, there {there or 'never drawn'}"
        )
    return [*lines, ""]


def points(change: dict[str, Any]) -> str:
    return f"{100 * change['difference']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def rate_of(rate: dict[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def drawn_under(task: Task, done: Done) -> str:
    rates = {under: look(task.bench.detector, t(pixels)).rate.rate for under, pixels in done.pixels.items()}
    return ", ".join(f"{UNDER.get(under, f'step {under}')} {rate:.0%}" for under, rate in rates.items())


def tell(result: dict[str, Any], page: Path) -> None:
    from anabranch.jobs.erase.demo_page import lead

    print()
    for sentence in lead(result):
        print(sentence)
    print(
        f"\n{result['seconds'] / 60:.1f} minutes, {result['cpu_seconds'] / 60:.1f} of processor time. "
        f"The page to look at: {page}"
    )
