# SPDX-License-Identifier: Apache-2.0
"""How serving is exercised: on drawn traces and counts."""

import torch

from anabranch.reuse.serve import eviction, expert_cache, placement, prefetch
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
