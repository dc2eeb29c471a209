# SPDX-License-Identifier: Apache-2.0
"""How Geom-Erasing is exercised, from boxes to a LoRA that needs no negative prompt."""

import torch

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.captioned import CaptionedBatches
from anabranch.suppress.denoising import Denoising, region_loss
from anabranch.suppress.geom_erasing import bake, bins, erase, negatives, words
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.guidance import first_noise
from anabranch.suppress.lora import add_lora
from anabranch.testing import Subject, along
from tests.suppress import drawn

WORDS = Vocabulary(name="<mark>", grid=Grid(3, 3))
BOXES = [[(0.0, 0.0, 6.0, 6.0)], None, [(10.0, 10.0, 16.0, 16.0)], [], [(0.0, 0.0, 16.0, 16.0)], None]


def region_terms(g):
    values = torch.randn(2, 3, 4, 4, generator=g), torch.rand(2, 4, 4, generator=g)
    target = torch.randn(2, 3, 4, 4, generator=g).double()
    return {"region_loss": (lambda output, weights: region_loss(output, target, weights), values)}


def subject_bins() -> Subject:
    def call(boxes, alpha, size):
        covered = bins.covered_bins(boxes, size, size, Grid(4, 3))
        weights = bins.region_weights(covered, Grid(4, 3), alpha)
        return {"covered": covered, "weights": weights, "upsampled": bins.upsampled(weights, (6, 8))}

    return Subject(
        inputs=lambda g: {"boxes": [(0.0, 1.0, 6.0, 5.0), (10.0, 10.0, 15.0, 16.0)], "alpha": 2.0, "size": 16.0},
        call=call,
        samples=along(2, {"boxes": 0}),
        off=lambda given: (call(given["boxes"], 1.0, 16.0)["weights"], torch.ones(3, 4)),
    )


def subject_words() -> Subject:
    def call(table, ids, bins):
        return {"rows": words.first_rows(table, WORDS, ids), "caption": WORDS.suffix(bins)}

    return Subject(
        inputs=lambda g: {"table": torch.randn(12, 8, generator=g), "ids": [3, 5], "bins": WORDS.grid.bins()[:2]},
        call=call,
    )


def subject_negatives() -> Subject:
    def call(training_bins, share, seed):
        prior = negatives.prior_bins(training_bins, 3, share)
        told = negatives.negative_prompts("prior", WORDS, 3, training_bins=training_bins, most=3, seed=seed)
        return {"prior": prior, "prompts": told}

    places = WORDS.grid.bins()
    return Subject(
        inputs=lambda g: {
            "training_bins": [places[:2], places[1:3], places[1:2], places[4:5]],
            "share": 0.7,
            "seed": 0,
        },
        call=call,
        samples=along(4, {"training_bins": 0}),
    )


def subject_erase() -> Subject:
    def inputs(g):
        pipe = drawn.base()
        latents = drawn.latents(pipe, g)
        made = erase.prepare(pipe, WORDS, erase.Config(r=2), latents, drawn.CAPTIONS, BOXES, size=16, word="mark")
        objective = Denoising(pipe, made.parameters)
        with torch.no_grad():
            for value in objective.parameters():
                value += 0.05 * torch.randn(value.shape, generator=g)
        return {
            "objective": objective,
            "batch": CaptionedBatches(made.data, drawn.BATCH, seed=0).batch(0),
            "pipe": pipe,
        }

    return Subject(
        inputs=inputs,
        call=lambda objective, batch, pipe: objective(batch),
        touches=lambda given, output: ["objective.*"],
        samples=along(drawn.BATCH, {"batch.*": 0}),
        terms=region_terms,
        tolerance=1e-4,
    )


def subject_bake() -> Subject:
    def make(g):
        student, teacher = drawn.base(), drawn.base()
        prompts = [encode_prompts(teacher, texts) for texts in (["a dress", "a bag"], ["mark"] * 2, [""])]
        made = bake.Baking(student, teacher, add_lora(student, 2, 0), *prompts, eta=0.7, keep_coef=0.5)
        with torch.no_grad():
            for value in made.parameters():
                value += 0.05 * torch.randn(value.shape, generator=g)
        return made

    def inputs(g):
        objective = make(g)
        noise = first_noise(objective.pipe, range(6))
        batch = bake.BakingBatches(noise, torch.arange(6) % 2, drawn.BATCH, seed=0).batch(0)
        return {"objective": objective, "batch": batch, "pipe": objective.pipe, "teacher": objective.teacher[0]}

    return Subject(
        inputs=inputs,
        call=lambda objective, batch, pipe, teacher: objective(batch),
        touches=lambda given, output: ["objective.*"],
        samples=along(drawn.BATCH, {"batch.*": 0}),
        terms=region_terms,
        tolerance=1e-4,
    )
