# SPDX-License-Identifier: Apache-2.0
"""What the processes of `anabranch demo erase` do side by side: draw, train an eraser, attack it. Nobody judges here.

Shapes    : N pictures (N, 1, 28, 28) uint8 under every negative prompt, all from the same prompts and seeds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CheckFailed
from anabranch.jobs.erase.arms import Subject
from anabranch.jobs.erase.card import adapter_card
from anabranch.jobs.erase.diagnose import Looks, looks_after, looks_before, with_word
from anabranch.jobs.erase.garment_arms import fine_tuned, geom, name_only, shuffled, untouched
from anabranch.jobs.erase.garment_bench import NEW_WORDS, Bench, Made
from anabranch.jobs.erase.garment_judges import train_judges
from anabranch.jobs.erase.garment_scores import draw_policies, place_control
from anabranch.jobs.erase.marked_garments import GRID, MARK, MARK_PLACES, PLATE, SIDE, World
from anabranch.jobs.erase.sample import draw
from anabranch.models.diffusion.family import family
from anabranch.models.diffusion.latents import to_latents
from anabranch.suppress.attacks import relearning
from anabranch.suppress.geom_erasing.adapter import Applied, apply, fingerprint, hashes, save_adapter
from anabranch.suppress.geom_erasing.adapter_folder import read_adapter
from anabranch.suppress.geom_erasing.bins import covered_bins
from anabranch.suppress.geom_erasing.erase import start_rows

POLICY = "detected"
"""The negative prompt that is called erased, chosen before anything was drawn."""
POLICIES = {
    "before": ("none", "word"),
    "boxes": ("none", "name", "detected"),
    "shuffled": ("none", "name", "detected"),
    "name": ("none", "name", "detected"),
    "plain": ("none", "word"),
}
ERASERS: dict[str, Callable[[Bench], Made]] = {
    "boxes": lambda bench: geom(bench, words=NEW_WORDS),
    "shuffled": lambda bench: geom(bench, shuffled(bench.labels(), bench.seed), words=NEW_WORDS),
    "name": lambda bench: geom(bench, name_only(bench.labels()), words=NEW_WORDS),
    "plain": fine_tuned,
}
"""Places are called by new words, so that the adapter is one that every command takes."""
ADAPTER, JUDGES = "adapter", "judges"


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    bench: Bench
    out: Path
    marked: World
    """Pictures of the test part, all with the mark, that no model here was trained on."""
    clean: World
    looked_at: int
    judge_steps: int
    control_samples: int
    attack_samples: int
    attack_pictures: int
    attack_at: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Done:
    """One piece of work: pictures by negative prompt, or by step of an attack."""

    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    looks: dict[str, Looks] = field(default_factory=dict)
    control: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def work(task: Task, item: str) -> Done:
    started = time.monotonic()
    return replace(WORK[item](task, item), seconds=time.monotonic() - started)


def before(task: Task, item: str) -> Done:
    """The model as it is: plain, away from the word, and asked for the word; where the word looks in real pictures."""
    bench, few = task.bench, slice(task.looked_at)
    made = untouched(bench)
    pixels = draw_policies(bench, made, POLICIES[item])
    pixels["asked"] = draw(
        made.pipe, with_word(made.pipe, bench.prompts, MARK), bench.nothing(), bench.seeds, bench.how
    )
    seen = task.marked
    looks = looks_before(made.pipe, seen.captions[few], seen.pixels[few], seen.boxes[few], MARK)
    return Done(pixels=as_numpy(pixels), looks={"word": looks})


def judges(task: Task, item: str) -> Done:
    train_judges(task.bench.images, task.out / JUDGES, steps=task.judge_steps)
    return Done()


def arm(task: Task, item: str) -> Done:
    """Train one arm and draw it; the one with boxes is kept as an adapter."""
    bench = task.bench
    made = ERASERS[item](bench)
    trained = time.monotonic()
    pixels = draw_policies(bench, made, POLICIES[item])
    if made.prepared is None:
        return Done(pixels=as_numpy(pixels), facts=dict(bench.noted))
    control = place_control(bench, made, task.control_samples)
    facts, looks = dict(bench.noted), {}
    if item == "boxes":
        pixels["asked"] = draw(made.pipe, asking(bench), bench.nothing(), bench.seeds, bench.how)
        facts |= keep(task, made)
        looks = where_it_looks(task, made)
    return Done(
        pixels=as_numpy(pixels), control=control, looks=looks, facts=facts | {"drawn_in": time.monotonic() - trained}
    )


def attack(task: Task, item: str) -> Done:
    """Fine-tune the erased model, on pictures of the mark or on clean ones, its negative prompt left in place."""
    bench, many = task.bench, slice(task.attack_samples)
    world = task.marked if item == "relearn" else task.clean
    few = slice(task.looked_at, task.looked_at + task.attack_pictures)
    pipe = bench.open()
    applied = apply(pipe, task.out / ADAPTER)
    subject = Subject(pipe=pipe, how=bench.how, applied=applied, policy=POLICY, detector=bench.detector)
    config = relearning.Config(at=task.attack_at, seed=bench.seed)
    seen = relearning.relearn(
        pipe,
        to_latents(pipe, world.pixels[few]),
        world.captions[few],
        config,
        lambda step: subject.draw(bench.prompts[many], bench.seeds[many]).numpy(),
    )
    return Done(pixels={str(step): pixels for step, pixels in seen})


WORK: dict[str, Callable[[Task, str], Done]] = {
    "before": before,
    "judges": judges,
    **dict.fromkeys(ERASERS, arm),
    **dict.fromkeys(("relearn", "benign"), attack),
}


def places(count: int) -> list[tuple[int, int, int, int]]:
    """Where the mark is asked for, a box a picture."""
    corners = [MARK_PLACES[i % len(MARK_PLACES)] for i in range(count)]
    return [(x, y, x + PLATE, y + PLATE) for x, y in corners]


def asking(bench: Bench) -> list[str]:
    """The bench's prompts with the learnt name and a place."""
    boxes = places(bench.samples)
    return [
        f"{prompt} {NEW_WORDS.suffix(covered_bins([box], SIDE, SIDE, GRID))}"
        for prompt, box in zip(bench.prompts, boxes, strict=True)
    ]


def where_it_looks(task: Task, made: Made) -> dict[str, Looks]:
    few, seen = slice(task.looked_at), task.marked
    applied = Applied(
        pipe=made.pipe, adapter=read_adapter(task.out / ADAPTER), attached=made.prepared.attached, policy=POLICY
    )
    name, whole = looks_after(applied, seen.captions[few], seen.pixels[few], seen.boxes[few])
    return {"name": name, "name and places": whole}


def keep(task: Task, made: Made) -> dict[str, Any]:
    """Write the adapter as `anabranch erase train` does; what was trained, and that nothing else changed."""
    bench, ready, folder = task.bench, made.prepared, task.out / ADAPTER
    base = bench.open()
    facts = touched(hashes(base), made.pipe)
    start, end = start_rows(base, NEW_WORDS, MARK), ready.attached.rows()
    moved = {k: round(float((end[k] - v).norm(dim=1).mean() / v.norm(dim=1).mean()), 4) for k, v in start.items()}
    regime, labels = bench.regime, bench.labels()
    config = {
        "model": str(bench.base),
        "base": fingerprint(base),
        "concept": MARK,
        "mode": "data",
        "trained": regime.trained,
        "alpha": regime.alpha,
        "r": regime.r,
        "seed": bench.seed,
        "images": len(labels),
        "with_concept": sum(boxes is not None for boxes in labels),
        "detector": bench.detector.name,
        "detector_version": bench.detector.version,
        "threshold": bench.detector.threshold,
        "steps": regime.steps,
        "words_moved": moved,
        "coarsened": ready.coarsened,
        "captions_cut": ready.cut,
        "policy": POLICY,
        "warnings": [],
    }
    folder.mkdir()
    save_adapter(made.pipe, folder, NEW_WORDS, ready.attached, [bins for bins in ready.bins if bins], config)
    card = adapter_card(made.pipe, dict(read_adapter(folder).config))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return facts | {"words_moved": moved}


def touched(before: dict[str, str], pipe: Any) -> dict[str, int]:
    """Tensors that changed, were added, or are as before; nothing but the denoiser may have changed."""
    after = {name.replace(".table.", "."): value for name, value in hashes(pipe).items()}
    changed = [name for name, value in before.items() if after.get(name) != value]
    if strange := [name for name in changed if not name.startswith(f"{family(pipe).DENOISER}.")]:
        raise CheckFailed("tensors changed that were not to change", received=", ".join(strange[:5]))
    if not changed:
        raise CheckFailed("training left the denoiser as it was")
    new = sum(name not in before for name in after)
    return {"changed": len(changed), "new": new, "as_before": len(before) - len(changed)}


def as_numpy(pixels: dict[str, Any]) -> dict[str, np.ndarray]:
    """Plain arrays travel between processes without shared memory."""
    return {name: tensor.numpy() for name, tensor in pixels.items()}
