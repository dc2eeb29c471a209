# SPDX-License-Identifier: Apache-2.0
"""How steering is exercised: recipes from scores, and the contrast of two routings."""

import torch

from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.steer import dsmoe, ftri, rice, scmoe, steermoe
from anabranch.testing import Reordering, Subject
from tests.measure.experts import drawn

NAMES = ("layer 0", "layer 1")


def steering(call) -> Subject:
    """Of drawn scores; another order of the experts names the same ones by their new numbers."""

    def renamed(recipe, order):
        places = {old: new for new, old in enumerate(order)}
        return [sorted((layer, places[e]) for layer, e in step) for step in recipe]

    return Subject(
        inputs=lambda g: {"scores": torch.randn(2, 6, generator=g), "amount": 2.0},
        call=lambda scores, amount: [
            (step.kind, step.amount, sorted(step.experts)) for step in call(scores, amount).steps
        ],
        samples=None,
        experts=Reordering(
            size=6,
            inputs=lambda given, order: {**given, "scores": given["scores"][:, order]},
            output=lambda found, order: renamed(found, order),
            compared=lambda found: [step[2] for step in found],
        ),
    )


def subject_dsmoe() -> Subject:
    return steering(lambda scores, amount: dsmoe.recipe(scores, NAMES, num=3, alpha=amount))


def subject_ftri() -> Subject:
    return steering(lambda scores, amount: ftri.recipe(scores, NAMES, num=3, top_k=2))


def subject_rice() -> Subject:
    return steering(lambda scores, amount: rice.recipe(scores, NAMES, num=2, beta=amount))


def subject_steermoe() -> Subject:
    return steering(lambda scores, amount: steermoe.recipe(scores, NAMES, promote=2, suppress=1, top_k=2))


def subject_scmoe() -> Subject:
    def terms(g):
        values = tuple(torch.randn(3, 5, generator=g) for _ in range(2))
        return {"contrast": (lambda s, w: scmoe.contrast(s, w, 1e-9), values)}

    return Subject(
        inputs=lambda g: {
            "model": drawn.model(g), "input_ids": torch.randint(3, 97, (3, 5), generator=g),
            "config": scmoe.Config(), "attention_mask": torch.ones(3, 5, dtype=torch.long),
        },
        call=lambda **given: scmoe.generate(**given, max_new_tokens=2),
        terms=terms,
        samples=Reordering(
            size=3,
            inputs=lambda given, order: {**given, "input_ids": given["input_ids"][order]},
            output=lambda result, order: result[order],
        ),
        experts=drawn.of(8, drawn.model_of_experts, "model"),
        pad=lambda given: {
            **given, "input_ids": torch.cat([torch.full((3, 2), 7), given["input_ids"]], 1),
            "attention_mask": torch.cat([torch.zeros(3, 2, dtype=torch.long), given["attention_mask"]], 1),
        },
        unpad=lambda result: result[:, -7:],
    )  # fmt: skip


__all__ = ["mixture_layers"]
