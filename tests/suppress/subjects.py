# SPDX-License-Identifier: Apache-2.0
"""How guidance and LoRA are exercised."""

import torch

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress import guidance, lora
from anabranch.suppress.guidance import Negative, ThreeBranch, first_noise, sample
from anabranch.testing import Subject, along
from tests.suppress import drawn


def subject_guidance() -> Subject:
    def rules(pipe, prompts, scale):
        positive, negative, empty = (encode_prompts(pipe, texts) for texts in (prompts, ["mark"] * 2, [""] * 2))
        return (
            Negative(positive=positive, negative=negative, scale=scale),
            ThreeBranch(positive=positive, negative=negative, empty=empty, scale=scale, negative_scale=0.5),
            Negative(positive=positive, negative=empty, scale=scale),
        )

    def call(pipe, prompts, noise, scale):
        return [guidance.sample(pipe, rule, noise, 2) for rule in rules(pipe, prompts, scale)[:2]]

    def strength_0(given):
        pipe, noise = given["pipe"], given["noise"]
        _, three, plain = rules(pipe, given["prompts"], 3.0)
        three.negative_scale = 0.0
        return sample(pipe, three, noise, 2), sample(pipe, plain, noise, 2)

    return Subject(
        inputs=lambda g: {
            "pipe": (pipe := drawn.pipeline(g)), "prompts": ["a dress", "a bag"], "noise": first_noise(pipe, [3, 11]),
            "scale": 3.0,
        },
        call=call,
        off=strength_0,
        samples=along(2, {"prompts": 0, "noise": 0}, {"?": 0}),
        half={torch.bfloat16: 0.1, torch.float16: 0.05},
        tolerance=1e-4,
    )  # fmt: skip


def subject_lora() -> Subject:
    def call(pipe, noise, seed):
        lora.add_lora(pipe, 2, seed)
        with torch.no_grad():
            for value in lora.lora_parameters(pipe).values():
                value += 0.05
        made = drawn.pictured(pipe, 1)
        lora.remove_lora(pipe)
        return made

    def strength_0(given):
        pipe = given["pipe"]
        plain = drawn.pictured(pipe)
        lora.add_lora(pipe, 2, 0)
        return drawn.pictured(pipe), plain

    def reload(output, folder):
        """Pictures of a pipeline that the file was loaded into."""
        first, again = drawn.base(), drawn.base()
        lora.add_lora(first, 2, 5)
        with torch.no_grad():
            for value in lora.lora_parameters(first).values():
                value += 0.05
        lora.save_lora(first, folder)
        lora.load_lora(again, folder)
        assert torch.equal(drawn.pictured(first), drawn.pictured(again))
        return output

    return Subject(
        inputs=lambda g: {"pipe": (pipe := drawn.pipeline(g)), "noise": first_noise(pipe, [3]), "seed": 1},
        call=call,
        off=strength_0,
        reload=reload,
        half={torch.bfloat16: 0.1, torch.float16: 0.05},
    )
