# SPDX-License-Identifier: Apache-2.0
"""How serving is exercised: on drawn traces and counts."""

import torch

from anabranch.models.mixtures.adapter import difference, fused_of
from anabranch.models.mixtures.layers import mixture_layers, open_layers
from anabranch.reuse.serve import eviction, expert_cache, expert_flow, expert_weave, llep, placement, prefetch
from anabranch.testing import Subject, along
from tests.measure.experts import drawn


def subject_expert_cache() -> Subject:
    machine = expert_cache.Machine(expert_bytes=2.0, bandwidth=4.0, compute=0.1)

    def call(trace, machine):
        report = expert_cache.simulate(trace, 3, eviction.lru)
        return {"report": report, "seconds": report.seconds(machine), "bytes": report.bytes(machine)}

    return Subject(
        inputs=lambda g: {"trace": drawn.trace(g), "machine": machine},
        call=call,
        experts=drawn.of(drawn.EXPERTS, drawn.trace_of_experts, "trace"),
    )


def subject_prefetch() -> Subject:
    def call(stored, follows):
        nearest, previous = prefetch.NearestHistory(stored, 2), prefetch.PreviousLayer(follows, 2)
        wanted = []
        for layer, experts in enumerate([(0, 1), (2, 3)]):
            wanted.append((nearest.want(0, 0, layer), previous.want(0, 0, layer)))
            nearest.see(0, 0, layer, experts)
            previous.see(0, 0, layer, experts)
        return wanted

    def inputs(g):
        trace = drawn.trace(g)
        return {"stored": prefetch.histories(trace), "follows": prefetch.followers(trace)}

    return Subject(inputs=inputs, call=call, samples=along(5, {"stored": 0}))


def subject_placement() -> Subject:
    devices = placement.Devices(token_seconds=1.0, expert_bytes=8.0, token_bytes=2.0, bandwidth=4.0)

    def call(tokens_per_expert, devices, factor):
        owner = placement.contiguous(len(tokens_per_expert), 3)
        plan = placement.least_loaded(tokens_per_expert, owner, 3, factor=factor, min_chunk=2)
        return {"plan": plan, "cost": placement.cost(plan, devices), "load": plan.load}

    return Subject(
        inputs=lambda g: {
            "tokens_per_expert": torch.randint(50, (6,), generator=g).tolist(), "devices": devices, "factor": 1.2,
        },
        call=call,
    )  # fmt: skip


def subject_expert_flow() -> Subject:
    """One step of the predictor, and what it foresees."""
    config = expert_flow.Config(vocab_size=20, num_layers=drawn.LAYERS, num_experts=drawn.EXPERTS, hidden_size=8)

    def call(objective, ids, trace):
        logits = objective(ids)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, expert_flow.paths(trace).to(logits))
        return {"loss": loss, "logits": logits}

    return Subject(
        inputs=lambda g: {
            "objective": expert_flow.PathPredictor(config, generator=g),
            "ids": torch.randint(20, (12,), generator=g), "trace": drawn.trace(g, documents=1),
        },
        call=call,
        touches=lambda given, output: ["objective.*"],
        configs=(config,),
    )  # fmt: skip


def subject_expert_weave() -> Subject:
    def inputs(g):
        base, tuned = drawn.model(torch.Generator().manual_seed(1)), drawn.model(torch.Generator().manual_seed(1))
        with torch.no_grad():
            for value in fused_of(mixture_layers(tuned)[0]).values():
                value[2] += 0.1 * torch.randn(value[2].shape, generator=g)
        ids = torch.randint(3, 97, (3, 6), generator=g)
        return {"model": base, "adapters": [difference(base, tuned)], "ids": ids, "rows": [0, -1, 0]}

    def call(model, adapters, ids, rows):
        woven = expert_weave.ExpertWeave(model, adapters)
        with woven.serving(rows), torch.no_grad():
            made = model(ids, use_cache=False).logits
        woven.remove()
        return made

    def strength_0(given):
        with torch.no_grad():
            plain = given["model"](given["ids"], use_cache=False).logits
        return call(**given | {"rows": [-1, -1, -1]}), plain

    return Subject(
        inputs=inputs,
        call=call,
        off=strength_0,
        samples=along(3, {"ids": 0, "rows": 0}, {"": 0}),
    )


def subject_llep() -> Subject:
    def inputs(g):
        layer = open_layers(drawn.model(g))[0]
        selected = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(10)])
        weights = torch.rand(10, 2, generator=g)
        return {
            "block": layer.block,
            "hidden": torch.randn(10, 32, generator=g),
            "selected": selected,
            "weights": weights,
        }

    def layer_of(block):
        return open_layers(torch.nn.ModuleDict({"block": block}))[0]

    def call(block, hidden, selected, weights):
        matrices, compute = llep.of_layer(layer_of(block))
        counts = torch.bincount(selected.flatten(), minlength=8).tolist()
        plan = placement.least_loaded(counts, placement.contiguous(8, 2), 2, min_chunk=1)
        return llep.emulate(plan, compute, matrices, hidden, selected, weights)

    return Subject(
        inputs=inputs,
        call=call,
        samples=along(10, {"hidden": 0, "selected": 0, "weights": 0}, {"": 0}),
    )
