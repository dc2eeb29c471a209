# SPDX-License-Identifier: Apache-2.0
"""How merging is exercised, on a small mixture and drawn tokens."""

import torch

from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.merge import compressed_experts, mc_smoe, sub_moe
from anabranch.testing import Reordering, Subject, along
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


def subject_compressed_experts() -> Subject:
    def inputs(g):
        model = drawn.model(g).requires_grad_(False)
        made = compressed_experts.CompressedExperts(mixture_layers(model), 1)
        with torch.no_grad():
            for value in made.offsets:
                value += 0.1 * torch.randn(value.shape, generator=g)
        objective = compressed_experts.NextToken(model, made)
        ids = torch.randint(3, 97, (3, 8), generator=g)
        return {"objective": objective, "batch": {"input_ids": ids, "labels": ids}, "model": model}

    def strength_0(given):
        """All experts of a token are run, none is compressed."""
        model, ids = given["model"], given["batch"]["input_ids"]
        whole = compressed_experts.CompressedExperts(mixture_layers(model), 2)
        with torch.no_grad():
            plain = model(ids, use_cache=False).logits
            with whole.applied():
                return model(ids, use_cache=False).logits, plain

    def reload(output, folder):
        model = drawn.model(torch.Generator().manual_seed(0))
        made = compressed_experts.CompressedExperts(mixture_layers(model), 1)
        with torch.no_grad():
            for value in made.offsets:
                value.normal_(generator=torch.Generator().manual_seed(1))
        made.save(folder / "vectors.safetensors")
        again = compressed_experts.CompressedExperts.load(folder / "vectors.safetensors", mixture_layers(model))
        assert all(torch.equal(a, b) for a, b in zip(made.offsets, again.offsets, strict=True))
        return output

    def permuted(given, order):
        drawn.model_of_experts(given["model"], order)
        for value in given["objective"].compressed.offsets:
            value.data = value.data[order]
        return given

    def terms(g):
        experts, weights = torch.randint(8, (5, 2), generator=g), torch.rand(5, 2, generator=g)
        offsets = torch.randn(8, 4, generator=g)
        return {"scale": (lambda value: compressed_experts.scale(value, experts, weights), (offsets,))}

    return Subject(
        inputs=inputs,
        terms=terms,
        experts=Reordering(size=8, inputs=permuted, output=lambda result, order: result),
        call=lambda objective, batch, model: objective(batch),
        touches=lambda given, output: ["objective.compressed.offsets.*"],
        samples=along(3, {"batch.*": 0}),
        off=strength_0,
        reload=reload,
    )
