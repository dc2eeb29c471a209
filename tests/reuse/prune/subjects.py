# SPDX-License-Identifier: Apache-2.0
"""How pruning is exercised: which experts are kept."""

import torch

from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.prune import naee, premoe
from anabranch.testing import Subject
from tests.measure.experts import drawn


def subject_naee() -> Subject:
    def renamed(output, order):
        keep, errors = output
        return {name: sorted(order.index(e) for e in kept) for name, kept in keep.items()}, errors

    def call(model, batches):
        found = naee.search(model, batches, 6)
        return {name: sorted(kept) for name, kept in found.keep.items()}, found.errors

    return Subject(
        inputs=lambda g: {
            "model": drawn.model(g), "batches": [{"input_ids": torch.randint(3, 97, (3, 10), generator=g)}],
        },
        call=call,
        samples=drawn.of(3, lambda batches, order: [{"input_ids": batches[0]["input_ids"][order]}], "batches"),
        experts=drawn.of(8, drawn.model_of_experts, "model", output=renamed),
        half={torch.bfloat16: 0.3, torch.float16: 0.1},
        tolerance=1e-4,
    )  # fmt: skip


def subject_premoe() -> Subject:
    def call(model, scores, pattern):
        layers = mixture_layers(model)
        library = premoe.TaskLibrary.of(layers, scores)
        return {"library": library, "task": library.retrieve(pattern), "keep": library.keep(layers, pattern, 4)}

    def reload(output, folder):
        output["library"].save(folder)
        return output | {"library": premoe.TaskLibrary.load(folder)}

    return Subject(
        inputs=lambda g: {
            "model": drawn.model(g), "pattern": torch.rand(8, generator=g),
            "scores": {name: torch.rand(2, 8, generator=g) for name in ("law", "code")},
        },
        call=call,
        reload=reload,
    )  # fmt: skip
