# SPDX-License-Identifier: Apache-2.0
"""How the baselines of erasing are exercised."""

import torch

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines import (
    clean_oracle,
    concept_ablation,
    data_filtering,
    esd,
    fine_tuning,
    masked_loss,
    negative_prompt,
    sld,
    uce,
)
from anabranch.suppress.denoising import region_loss
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.guidance import Negative, first_noise, sample
from anabranch.testing import Subject, along
from tests.suppress import drawn

CONTAINS = [True, False, True, False, False, True]
BOXES = [[(0, 0, 6, 6)], None, [(10, 10, 16, 16)], [], [], [(2, 2, 8, 8)]]


def region_terms(g):
    values = torch.randn(2, 3, 4, 4, generator=g), torch.rand(2, 4, 4, generator=g)
    target = torch.randn(2, 3, 4, 4, generator=g).double()
    return {"region_loss": (lambda output, weights: region_loss(output, target, weights), values)}


def learning(make, **more) -> Subject:
    """`make(pipe, latents)` gives objective and stream; the pipeline around the trained weights is looked at too."""

    def inputs(g):
        pipe = drawn.base()
        training = drawn.moved(make(pipe, drawn.latents(pipe, g)), g)
        return {"objective": training.objective, "batch": dict(training.stream.batch(0)), "pipe": pipe}

    def strength_0(given):
        """A fresh LoRA adds nothing."""
        pipe = drawn.base()
        plain = drawn.pictured(pipe)
        make(pipe, drawn.latents(pipe, torch.Generator().manual_seed(0)))
        return drawn.pictured(pipe), plain

    return Subject(
        inputs=inputs,
        off=strength_0,
        call=lambda objective, batch, pipe: objective(batch),
        touches=lambda given, output: ["objective.*"],
        **{"samples": along(drawn.BATCH, {"batch.*": 0}), "tolerance": 1e-4, "terms": region_terms, **more},
    )


def fine_tuned(config):
    return lambda pipe, latents: fine_tuning.training(pipe, config, latents, drawn.CAPTIONS, batch_size=drawn.BATCH)


def subject_fine_tuning() -> Subject:
    return learning(fine_tuned(fine_tuning.Config(r=2)))


def subject_clean_oracle() -> Subject:
    def make(pipe, latents):
        twins = latents.clone()
        twins[torch.tensor(CONTAINS)] += 1
        config = fine_tuning.Config(r=2)
        return clean_oracle.training(
            pipe, config, latents, twins, drawn.CAPTIONS, CONTAINS, batch_size=drawn.BATCH
        )  # fmt: skip

    return learning(make)


def subject_data_filtering() -> Subject:
    def make(pipe, latents):
        contains = [False] * 5 + [True]
        config = fine_tuning.Config(r=2)
        return data_filtering.training(
            pipe, config, latents, drawn.CAPTIONS, contains, batch_size=drawn.BATCH, minimum=4
        )

    return learning(make)


def subject_masked_loss() -> Subject:
    def make(pipe, latents):
        return masked_loss.training(
            pipe, fine_tuning.Config(r=2), latents, drawn.CAPTIONS, BOXES, batch_size=drawn.BATCH, size=16,
            grid=Grid(4, 4),
        )  # fmt: skip

    return learning(make)


def subject_concept_ablation() -> Subject:
    def make(pipe, latents):
        targets = [f"{caption} mark" for caption in drawn.CAPTIONS]
        config = concept_ablation.Config(r=2)
        return concept_ablation.training(pipe, config, latents, drawn.CAPTIONS, targets, batch_size=drawn.BATCH)

    # the square of a difference of two predictions, each of them rounded
    return learning(make, half={torch.bfloat16: 5e-2, torch.float16: 5e-3})


def subject_esd() -> Subject:
    config = esd.Config(r=2, num_steps=4)

    def terms(g):
        values = tuple(torch.randn(2, 3, 4, 4, generator=g) for _ in range(2))
        return {"erased_target": (lambda a, b: esd.erased_target(a, b, 0.7), values)}

    return learning(lambda pipe, latents: esd.training(pipe, config, "mark", batch_size=drawn.BATCH), terms=terms)


def sampling(rule, **more) -> Subject:
    """Pictures of two prompts under a rule of guidance."""
    return Subject(
        inputs=lambda g: {
            "pipe": (pipe := drawn.pipeline(g)),
            "noise": first_noise(pipe, [3, 11]),
            "scale": 3.0,
            "prompts": ["a dress", "a bag"],
        },
        call=lambda pipe, noise, scale, prompts: sample(pipe, rule(pipe, scale, prompts), noise, 3),
        samples=along(2, {"noise": 0, "prompts": 0}, {"": 0}),
        half={torch.bfloat16: 0.1, torch.float16: 0.05},
        tolerance=1e-4,
        **more,
    )


def subject_negative_prompt() -> Subject:
    def rule(pipe, scale, prompts):
        return negative_prompt.guidance(pipe, prompts, "mark", scale)

    return sampling(rule)


def subject_sld() -> Subject:
    def rule(pipe, scale, prompts, **changes):
        made = sld.guidance(pipe, prompts, "mark", scale, preset="strong", num_steps=3)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def strength_0(given):
        pipe, noise = given["pipe"], given["noise"]
        positive, empty = encode_prompts(pipe, ["a dress", "a bag"]), encode_prompts(pipe, ["", ""])
        plain = Negative(positive=positive, negative=empty, scale=3.0)
        off = rule(pipe, 3.0, given["prompts"], strength=0.0, momentum_scale=0.0)
        return sample(pipe, off, noise, 3), sample(pipe, plain, noise, 3)

    return sampling(rule, off=strength_0)


def subject_uce() -> Subject:
    def inputs(g):
        return {
            "pipe": drawn.pipeline(g),
            "config": uce.Config(lam=0.1),
            "words": ["mark", "ring"],
            "guides": ["", "bag"],
        }

    def strength_0(given):
        pipe, before = given["pipe"], drawn.weights(given["pipe"])
        before = {name: value.clone() for name, value in before.items()}
        edited = uce.edit(pipe, given["config"], given["words"], given["guides"])
        uce.put(pipe, edited.before)
        return drawn.weights(pipe), before

    return Subject(
        inputs=inputs,
        call=lambda pipe, config, words, guides: sorted(
            uce.edit(pipe, config, words, guides, ["dress", "coat"]).before
        ),
        changes=("pipe",),
        touches=lambda given, output: [f"pipe.unet.{name}" for name in output],
        off=strength_0,
        samples=along(2, {"words": 0, "guides": 0}),
        half={torch.bfloat16: 0.05, torch.float16: 5e-3},
    )
