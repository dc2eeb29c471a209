# SPDX-License-Identifier: Apache-2.0
"""How attacks on an erased model are exercised."""

import torch

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks import adversarial, inversion, paraphrase, partial, prompt_search, quantise, relearning
from anabranch.suppress.guidance import Negative, first_noise
from anabranch.testing import Subject, along
from tests.suppress import drawn

CAPTIONS = ["a dress", "a bag", "a coat"]
ROUGH = {torch.bfloat16: 0.1, torch.float16: 0.02}


def pictures(g, **more):
    pipe = drawn.pipeline(g)
    return {"pipe": pipe, "latents": drawn.latents(pipe, g)[:3], "captions": CAPTIONS, **more}


def subject_adversarial() -> Subject:
    config = adversarial.Config(num_words=2, steps=1, tried=4, draws=1)
    return Subject(inputs=lambda g: pictures(g, config=config), call=adversarial.search)


def subject_inversion() -> Subject:
    def call(pipe, latents, captions, config):
        with inversion.inverted(pipe, latents, captions, config, word="mark") as losses:
            return {"losses": losses, "pictures": drawn.pictured(pipe, 1)}

    config = inversion.Config(steps=2, batch_size=2)
    return Subject(inputs=lambda g: pictures(g, config=config), call=call, half=ROUGH)


def subject_paraphrase() -> Subject:
    return Subject(
        inputs=lambda g: {"prompt": "a beautiful photograph of a dress", "word": "mark"}, call=paraphrase.paraphrases
    )


def subject_partial() -> Subject:
    def call(pipe, latents, captions, noise, strength):
        rule = Negative(positive=encode_prompts(pipe, captions), negative=encode_prompts(pipe, [""] * 3), scale=2.0)
        return partial.sample_from(pipe, rule, latents, noise, 4, strength)

    return Subject(
        inputs=lambda g: (made := pictures(g)) | {"noise": first_noise(made["pipe"], [3, 5, 7]), "strength": 0.5},
        call=call,
        samples=along(3, {"latents": 0, "captions": 0, "noise": 0}, {"": 0}),
        half=ROUGH,
        tolerance=1e-4,
    )


def subject_prompt_search() -> Subject:
    config = prompt_search.Config(num_words=2, population=4, generations=2, most=2)
    return Subject(
        inputs=lambda g: {
            "pipe": drawn.pipeline(g), "prompts": ["a dress mark", "a bag mark"], "word": "mark", "config": config,
        },
        call=prompt_search.search,
        samples=along(2, {"prompts": 0}),
    )  # fmt: skip


def subject_quantise() -> Subject:
    def call(network, inputs, bits):
        with quantise.quantised(network, bits) as count:
            return {"count": count, "output": network(inputs)}

    def terms(g):
        network = torch.nn.Linear(6, 3).double()
        return {"output": (lambda inputs: call(network, inputs, 4)["output"], (torch.randn(4, 6, generator=g),))}

    def strength_0(given):
        network, inputs = given["network"], given["inputs"]
        with torch.no_grad():
            plain = network(inputs)
            call(**given)
            return network(inputs), plain  # as before, once it is over

    return Subject(
        inputs=lambda g: {
            "network": torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)).requires_grad_(False),
            "inputs": torch.randn(4, 6, generator=g), "bits": 4,
        },
        call=call,
        samples=along(4, {"inputs": 0}, {"output": 0}),
        terms=terms,
        off=strength_0,
    )  # fmt: skip


def subject_relearning() -> Subject:
    config = relearning.Config(at=(0, 2), r=2, batch_size=3)

    def call(pipe, latents, captions, config):
        return relearning.relearn(pipe, latents, captions, config, lambda step: drawn.pictured(pipe, 1))

    return Subject(inputs=lambda g: pictures(g, config=config), call=call, half=ROUGH)
