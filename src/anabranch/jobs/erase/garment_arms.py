# SPDX-License-Identifier: Apache-2.0
"""Every way to be rid of the mark, on one base, with the same pictures, steps and seeds.

An arm is made by `ARMS[name](bench)` and drawn by each of its policies. All arms of a base share prompts and seeds, so
that their pictures are paired.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anabranch.jobs.erase.garment_bench import KNOWN_WORDS, NEW_WORDS, Bench, Made, run
from anabranch.jobs.erase.marked_garments import (
    GRID,
    MARK,
    SIDE,
    Boxes,
    World,
    caption_of,
    clean_world,
    jittered,
    name_only,
    shuffled,
    with_mark,
)
from anabranch.jobs.erase.sample import batches, bins_found, draw
from anabranch.models.diffusion.latents import to_latents
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines import clean_oracle, concept_ablation, data_filtering, esd, masked_loss, sld, uce
from anabranch.suppress.baselines import fine_tuning as plain
from anabranch.suppress.captioned import CaptionedBatches
from anabranch.suppress.denoising import Denoising
from anabranch.suppress.geom_erasing.bake import Baking, BakingBatches
from anabranch.suppress.geom_erasing.erase import Config, most_bins, prepare, start_rows
from anabranch.suppress.geom_erasing.negatives import negative_prompts
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.guidance import first_noise, pictures
from anabranch.suppress.lora import add_lora

# What an arm does ----------------------------------------------------------------------------------------------------


def untouched(bench: Bench) -> Made:
    return Made(pipe=bench.open(), negatives={"none": bench.nothing, "word": lambda: [MARK] * bench.samples})


def fine_tuned(bench: Bench) -> Made:
    pipe = bench.open()
    run(bench, *plain.training(pipe, plain_config(bench), bench.latents, bench.world.captions, **batch(bench)))
    return replace(untouched(bench), pipe=pipe)


def oracle(bench: Bench) -> Made:
    pipe, world = bench.open(), bench.world
    twins, truth = to_latents(pipe, world.clean), world.marked.tolist()
    parts = clean_oracle.training(
        pipe, plain_config(bench), bench.latents, twins, world.captions, truth, **batch(bench)
    )  # fmt: skip
    run(bench, *parts)
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def filtered(bench: Bench) -> Made:
    pipe, seen = bench.open(), [boxes is not None for boxes in bench.labels()]
    parts = data_filtering.training(
        pipe, plain_config(bench), bench.latents, bench.world.captions, seen, **batch(bench)
    )  # fmt: skip
    run(bench, *parts)
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def masked(bench: Bench, recall: float | None = None) -> Made:
    pipe = bench.open()
    where = {"boxes": bench.labels(recall), "size": SIDE, "grid": GRID}
    run(bench, *masked_loss.training(
        pipe, plain_config(bench), bench.latents, bench.world.captions, **where, **batch(bench)
    ))  # fmt: skip
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def plain_config(bench: Bench) -> plain.Config:
    return plain.Config(trained=bench.regime.trained, r=bench.regime.r, seed=bench.seed)


def batch(bench: Bench) -> dict[str, int]:
    return {"batch_size": bench.regime.batch_size}


def geom(
    bench: Bench,
    boxes: Boxes | None = None,
    *,
    mode: str = "data",
    words: Vocabulary = KNOWN_WORDS,
    steps: int | None = None,
    world: World | None = None,
    latents: Tensor | None = None,
    **config: Any,
) -> Made:
    """Geom-Erasing, the places called by words that the base learned for another object; or by new ones (NEW_WORDS)."""
    regime, pipe = bench.regime, bench.open()
    world = bench.world if world is None else world
    rows = {name: table[: len(words.words())] for name, table in start_rows(pipe, words, MARK).items()}
    settings = {"trained": regime.trained, "alpha": regime.alpha, "r": regime.r, "token_rate": regime.token_rate}
    ready = prepare(
        pipe,
        words,
        Config(mode=mode, seed=bench.seed, **(settings | config)),
        bench.latents if latents is None else latents,
        world.captions,
        bench.labels() if boxes is None else boxes,
        size=SIDE,
        rows=rows,
    )
    stream = CaptionedBatches(ready.data, regime.batch_size, seed=bench.seed)
    run(bench, Denoising(pipe, ready.parameters), stream, steps=steps)
    return with_policies(bench, Made(pipe=pipe, negatives={}, words=words, prepared=ready))


def with_policies(bench: Bench, made: Made) -> Made:
    known = [bins for bins in made.prepared.bins if bins]
    most = most_bins(made.pipe, made.words)

    def prompts(policy: str) -> Callable[[], Sequence[str]]:
        options = {"training_bins": known, "most": most, "seed": bench.seed}
        return lambda: negative_prompts(policy, made.words, bench.samples, **options)

    made.negatives = {policy: prompts(policy) for policy in ("none", "name", "sampled", "prior")}
    made.drawn = {"detected": lambda: drawn_again(bench, made)}
    return made


def drawn_again(bench: Bench, made: Made) -> Tensor:
    """Policy detected: what the detector finds the mark in is drawn again with the bins of the mark."""
    first = draw(made.pipe, bench.prompts, bench.nothing(), bench.seeds, bench.how)
    bins = bins_found(first, bench.detector, GRID)
    rows = [i for i, found in enumerate(bins) if found]
    if rows:
        negatives = [made.words.suffix(bins[i]) for i in rows]
        asked = [bench.prompts[i] for i in rows]
        first[rows] = draw(made.pipe, asked, negatives, [bench.seeds[i] for i in rows], bench.how)
    return first


def anywhere(bench: Bench, marks: int = 1) -> World:
    """Marks at any place, not on the patches of the model alone; `marks` of them in a picture."""
    world = clean_world(bench.images.take(torch.arange(bench.regime.images)))
    for number in range(marks):
        world = with_mark(world, bench.regime.ratio, 5000 + bench.seed + 100 * number, places=None)
    return world


def plain_anywhere(bench: Bench) -> Made:
    """The same pictures, fine-tuned on without any word."""
    world, pipe = anywhere(bench), bench.open()
    parts = plain.training(pipe, plain_config(bench), to_latents(pipe, world.pixels), world.captions, **batch(bench))
    run(bench, *parts, steps=bench.regime.long_steps)
    return replace(untouched(bench), pipe=pipe)


def free_places(bench: Bench, marks: int = 1) -> Made:
    world = anywhere(bench, marks)
    options = {"world": world, "latents": to_latents(bench.open(), world.pixels), "words": NEW_WORDS}
    return geom(bench, bench.labels(world=world), **options, steps=bench.regime.long_steps)


def edited(bench: Bench) -> Made:
    pipe = bench.open()
    uce.edit(pipe, uce.Config(), [MARK], [""], [caption_of(name) for name in bench.images.class_names])
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def esd_arm(bench: Bench, variant: str) -> Made:
    pipe, regime = bench.open(), bench.regime
    config = esd.Config(
        variant=variant, guidance=regime.scale, num_steps=regime.sample_steps, r=regime.r, seed=bench.seed
    )  # fmt: skip
    run(bench, *esd.training(pipe, config, MARK, batch_size=16), steps=regime.eraser_steps, batch_size=16)
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def ablated(bench: Bench) -> Made:
    pipe, few = bench.open(), slice(0, 2000)
    anchors = bench.world.captions[few]
    config = concept_ablation.Config(trained="weights", layers="all", seed=bench.seed)
    targets = [f"{text} {MARK}" for text in anchors]
    parts = concept_ablation.training(pipe, config, bench.latents[few], anchors, targets, **batch(bench))
    run(bench, *parts, steps=bench.regime.short_steps)
    return Made(pipe=pipe, negatives={"none": bench.nothing})


def safe(bench: Bench) -> Made:
    pipe, steps = bench.open(), bench.regime.sample_steps

    def drawn() -> Tensor:
        parts = []
        for rows in batches(bench.samples, bench.how.batch_size):
            asked = [bench.prompts[i] for i in rows]
            rule = sld.guidance(pipe, asked, MARK, bench.regime.scale, preset="strong", num_steps=steps)
            parts.append(pictures(pipe, rule, first_noise(pipe, [bench.seeds[i] for i in rows]), steps))
        return torch.cat(parts)

    return Made(pipe=pipe, negatives={}, drawn={"strong": drawn})


def baked(bench: Bench, pictures_of_its_own: int = 512) -> Made:
    """The negative prompt of the boxes arm, put into a LoRA on the model that was fine-tuned."""
    teacher, student = geom(bench), geom(bench)
    names = [caption_of(name) for name in bench.images.class_names]
    numbers = torch.arange(pictures_of_its_own) % len(names)
    asked, seeds = [names[i] for i in numbers.tolist()], list(range(pictures_of_its_own))
    pixels = draw(teacher.pipe, asked, [KNOWN_WORDS.name] * len(asked), seeds, bench.how)
    prompts = [encode_prompts(teacher.pipe, texts) for texts in (names, [KNOWN_WORDS.name] * len(names), [""])]
    for parameter in student.prepared.parameters.values():
        parameter.requires_grad_(False)
    lora = add_lora(student.pipe, bench.regime.r, bench.seed)
    eta = (bench.regime.scale - 1) / bench.regime.scale
    objective = Baking(student.pipe, teacher.pipe, lora, *prompts, eta=eta, keep_coef=1.0)
    stream = BakingBatches(to_latents(teacher.pipe, pixels), numbers, bench.regime.batch_size, bench.seed)
    run(bench, objective, stream, steps=bench.regime.short_steps)
    return Made(pipe=student.pipe, negatives={"none": bench.nothing})


def long_plain(bench: Bench) -> Made:
    return fine_tuned(replace(bench, regime=replace(bench.regime, steps=bench.regime.long_steps)))


def new_places(bench: Bench, boxes: Boxes | None = None, steps: int | None = None) -> Made:
    return geom(bench, boxes, words=NEW_WORDS, steps=steps or bench.regime.long_steps)


def model_removal(bench: Bench, boxes: Boxes | None = None) -> Made:
    """The denoiser as it is; name and places are new words, and all that is trained."""
    rate, steps = bench.regime.frozen_token_rate, bench.regime.long_steps
    return geom(bench, boxes, mode="model", words=NEW_WORDS, steps=steps, token_rate=rate)


ARMS: dict[str, Callable[[Bench], Made]] = {
    "base": untouched,
    "plain": fine_tuned,
    "name": lambda bench: geom(bench, name_only(bench.labels())),
    "shuffled": lambda bench: geom(bench, shuffled(bench.labels(), bench.seed)),
    "boxes": geom,
    "oracle": oracle,
    "filtering": filtered,
    "masked loss": masked,
    "name, recall 1": lambda bench: geom(bench, name_only(bench.labels(1.0))),
    "shuffled, recall 1": lambda bench: geom(bench, shuffled(bench.labels(1.0), bench.seed)),
    "masked loss, recall 1": lambda bench: masked(bench, 1.0),
    "boxes, recall 1": lambda bench: geom(bench, bench.labels(1.0)),
    "model: boxes": model_removal,
    "model: name": lambda bench: model_removal(bench, name_only(bench.labels())),
    "model: shuffled": lambda bench: model_removal(bench, shuffled(bench.labels(), bench.seed)),
    "new places, long": new_places,
    "plain, long": long_plain,
    "name, long": lambda bench: geom(bench, name_only(bench.labels()), steps=bench.regime.long_steps),
    "UCE": edited,
    "SLD": safe,
    "Concept Ablation": ablated,
    "ESD-x": lambda bench: esd_arm(bench, "x"),
    "ESD-u": lambda bench: esd_arm(bench, "u"),
    "boxes, IoU 0.4": lambda bench: geom(bench, jittered(bench.labels(), 0.4, bench.seed)),
    "boxes, IoU 0.1": lambda bench: geom(bench, jittered(bench.labels(), 0.1, bench.seed)),
    "boxes, alpha 2": lambda bench: geom(bench, alpha=2.0),
    "baked": baked,
    "boxes, recall 0.3": lambda bench: geom(bench, bench.labels(0.3)),
    "new places": lambda bench: new_places(bench, steps=bench.regime.steps),
    "shuffled, new places, long": lambda bench: new_places(bench, shuffled(bench.labels(), bench.seed)),
    "plain, free places": plain_anywhere,
    "free places": free_places,
    "two marks": lambda bench: free_places(bench, marks=2),
    "boxes, LoRA": lambda bench: geom(bench, trained="lora"),
}
