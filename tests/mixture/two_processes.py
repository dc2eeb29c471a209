# SPDX-License-Identifier: Apache-2.0
"""One process of a data-parallel step: `python two_processes.py RANK WORLD FOLDER` writes its values and gradients."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from anabranch.mixture import (
    Context,
    GateNoise,
    LinearScore,
    Mixture,
    ModuleBank,
    Router,
    TableScore,
    TopK,
    balance_loss,
    hard_load_importance,
    importance_loss,
    renormalised,
    route,
    routings,
)

BATCH, EXPERTS = 8, 4


def routers():
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(5, 3, generator=generator)
    by_cluster = TableScore(centroids, EXPERTS, generator=generator)
    by_token = LinearScore(6, EXPERTS, generator=generator)
    return [
        Router(by_cluster, adjust=[GateNoise()]),
        Router(by_token, adjust=[GateNoise()], select=TopK(2), weigh=renormalised),
    ]


def step(rank: int, world: int) -> dict[str, list[float]]:
    """Value of each loss on this rank's rows of the global batch, and its gradient averaged over ranks."""
    generator = torch.Generator().manual_seed(1)
    x, clusters = torch.randn(BATCH, 3, 6, generator=generator), torch.arange(BATCH) % 5
    rows = torch.arange(BATCH).chunk(world)[rank]
    found = {}
    for number, router in enumerate(routers()):
        layer = Mixture(router, ModuleBank(nn.Identity() for _ in range(EXPERTS)))
        noise = torch.Generator().manual_seed(2)
        with route(layer, Context(ids={"cluster": clusters[rows]}, generator=noise, rows=rows, batch=BATCH)):
            layer(x[rows])
        routing = routings(layer)[""]
        for loss in (importance_loss, hard_load_importance, balance_loss):
            value = loss(routing, "global")
            (gradient,) = torch.autograd.grad(value, router.score.gate.weight, retain_graph=True)
            if world > 1:
                dist.all_reduce(gradient)
            found[f"{loss.__name__} {number}"] = [value.item(), *(gradient / world).flatten().tolist()]
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    (folder / f"{rank}.json").write_text(json.dumps(step(rank, world)))
    dist.destroy_process_group()
