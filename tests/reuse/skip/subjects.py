# SPDX-License-Identifier: Apache-2.0
"""How skipping is exercised: the thresholds that text gives, and passes under them."""

import torch

from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.skip import modes, naee
from anabranch.testing import Subject
from tests.measure.experts import drawn


def skipping(call, strength_0) -> Subject:
    return Subject(
        inputs=lambda g: {
            "model": drawn.model(g), "batches": [{"input_ids": torch.randint(3, 97, (3, 10), generator=g)}],
        },
        call=call,
        off=lambda given: strength_0(**given),
        samples=drawn.of(
            3, lambda batches, order: [{"input_ids": batches[0]["input_ids"][order]}], "batches",
            output=lambda output, order: output | {"logits": output["logits"][order]},
        ),
        experts=drawn.of(8, drawn.model_of_experts, "model"),
        half={torch.bfloat16: 0.3, torch.float16: 0.1},
        tolerance=1e-4,
    )  # fmt: skip


def logits(model, batches):
    with torch.no_grad():
        return model(**batches[0], use_cache=False).logits


def subject_naee() -> Subject:
    def call(model, batches):
        betas = naee.calibrate(model, batches)
        with naee.skipping(mixture_layers(model), betas):
            return {"betas": betas, "logits": logits(model, batches)}

    def strength_0(model, batches):
        layers = mixture_layers(model)
        with naee.skipping(layers, {layer.name: 0.0 for layer in layers}):
            received = logits(model, batches)
        return received, logits(model, batches)

    return skipping(call, strength_0)


def subject_modes() -> Subject:
    def call(model, batches):
        alpha = modes.layer_weights(model, batches)
        with modes.skipping(mixture_layers(model), alpha, (0.1, 0.1)):
            return {"alpha": alpha, "logits": logits(model, batches)}

    def strength_0(model, batches):
        layers = mixture_layers(model)
        with modes.skipping(layers, {layer.name: 0.5 for layer in layers}, (0.0, 0.0)):
            received = logits(model, batches)
        return received, logits(model, batches)

    return skipping(call, strength_0)
