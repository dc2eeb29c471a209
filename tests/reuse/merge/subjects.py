# SPDX-License-Identifier: Apache-2.0
"""How merging is exercised, on a small mixture and drawn tokens."""

import torch

from anabranch.reuse.merge import mc_smoe, sub_moe
from anabranch.testing import Subject
from tests.measure.experts import drawn


def merging(merge, every) -> Subject:
    """`every` merges nothing: as many groups as experts."""

    def strength_0(given):
        before = {name: value.clone() for name, value in given["model"].state_dict().items()}
        every(given["model"], given["batches"])
        return given["model"].state_dict(), before

    def inputs(g):
        return {"model": drawn.model(g), "batches": [{"input_ids": torch.randint(3, 97, (4, 12), generator=g)}]}

    return Subject(
        inputs=inputs,
        call=lambda model, batches: vars(merge(model, batches)),
        changes=("model",),
        touches=lambda given, output: ["model.model.layers.*.mlp.experts.*"],
        samples=drawn.of(
            4, lambda batches, order: [{"input_ids": batches[0]["input_ids"][order]}], "batches",
            compared=lambda output: output["labels"],
        ),
        off=strength_0,
    )  # fmt: skip


def subject_mc_smoe() -> Subject:
    return merging(lambda model, batches: mc_smoe.merge(model, batches, 8), lambda *given: mc_smoe.merge(*given, 16))


def subject_sub_moe() -> Subject:
    return merging(lambda model, batches: sub_moe.merge(model, batches, 4), lambda *given: sub_moe.merge(*given, 8))
