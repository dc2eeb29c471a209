# SPDX-License-Identifier: Apache-2.0
"""One process of expert parallelism: `python llep_worker.py FOLDER` writes what it computed, then loses its peer."""

import json
import os
import sys
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from anabranch.errors import AnabranchError
from anabranch.reuse.serve.exchange import exchange, workers
from anabranch.reuse.serve.llep import dispatch
from anabranch.reuse.serve.placement import Chunk, Plan, least_loaded, native

WIDTH, INNER, EXPERTS, TOP_K = 5, 4, 5, 2
OWNER = [0, 0, 1, 0, 1]
TOKENS = {"uneven": (12, 7), "none here": (0, 9)}


def compute(own, x):
    """Two matrices, a bias and a curve between."""
    return torch.tanh(x @ own["up"]) @ own["down"] + own["bias"]


def drawn(tokens):
    """All experts' matrices and all processes' tokens, in double; most tokens go to expert 0."""
    g = torch.Generator().manual_seed(tokens)
    shapes = {"up": (EXPERTS, WIDTH, INNER), "down": (EXPERTS, INNER, WIDTH), "bias": (EXPERTS, WIDTH)}
    matrices = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    hidden = torch.randn(tokens, WIDTH, generator=g, dtype=torch.float64)
    likely = torch.tensor([8.0, 1.0, 1.0, 0.0, 2.0]).expand(tokens, -1)  # expert 3 gets none
    selected = torch.multinomial(likely, TOP_K, generator=g) if tokens else torch.zeros(0, TOP_K, dtype=torch.int64)
    weights = torch.rand(tokens, TOP_K, generator=g, dtype=torch.float64)
    target = torch.randn(tokens, WIDTH, generator=g, dtype=torch.float64)
    return matrices, hidden, selected, weights, target


def all_away(tokens_per_expert, owner, num_devices):
    """Nobody keeps an expert: every matrix travels, and some in two chunks."""
    chunks = []
    for e, n in enumerate(tokens_per_expert):
        edges = sorted({0, n // 2, n}) if e == 0 else sorted({0, n})
        chunks += [Chunk(e, 1 - owner[e], a, b) for a, b in pairwise(edges)]
    return Plan(tuple(chunks), tuple(owner), num_devices, sum(tokens_per_expert))


def all_to_the_first(tokens_per_expert, owner, num_devices):
    """The second process runs nothing, and lends everything."""
    chunks = tuple(Chunk(e, 0, 0, n) for e, n in enumerate(tokens_per_expert) if n)
    return Plan(chunks, tuple(owner), num_devices, sum(tokens_per_expert))


PLANNERS = {
    "native": native,
    "least loaded": partial(least_loaded, factor=1.0, threshold=1.0, min_chunk=1),
    "all away": all_away,
    "all to the first": all_to_the_first,
}


def run(rank, group, planner, tokens):
    matrices, hidden, selected, weights, target = drawn(sum(tokens))
    rows = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    mine = [e for e in range(EXPERTS) if OWNER[e] == rank]
    own = {name: value[mine].requires_grad_() for name, value in matrices.items()}
    x, w = hidden[rows].requires_grad_(), weights[rows].requires_grad_()
    rows_run = []

    def counted(matrices, rows):
        rows_run.append(len(rows))
        return compute(matrices, rows)

    y = dispatch(counted, own, OWNER, x, selected[rows], w, group=group, planner=planner)
    (y * target[rows]).sum().backward()
    found = {"output": y.detach(), "hidden": x.grad, "weights": w.grad}
    found = {name: value.tolist() for name, value in (found | {n: v.grad for n, v in own.items()}).items()}
    return found | {"rows": sum(rows_run)}


def lose(rank, impatient, patient):
    """First the second process goes another way than the first, then it dies between forward and backward."""
    messages = []
    if rank == 0:
        try:
            exchange(torch.zeros(2, 1), [1, 1], [1, 1], impatient)
        except AnabranchError as error:
            messages.append(str(error))
    matrices, hidden, selected, weights, _ = drawn(8)
    own = {name: value[[e for e in range(EXPERTS) if OWNER[e] == rank]] for name, value in matrices.items()}
    rows_run = []

    def counted(matrices, rows):
        rows_run.append(len(rows))
        return compute(matrices, rows)

    y = dispatch(counted, own, OWNER, hidden.requires_grad_(), selected, weights, group=patient)
    if rank == 1:
        os._exit(9)
    try:
        y.sum().backward()
    except AnabranchError as error:
        messages.append(str(error))
    return messages


def main(folder):
    with workers(timeout=60) as patient:
        impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
        rank = dist.get_rank()
        found = {
            f"{name}, {kind}": run(rank, patient, PLANNERS[name], TOKENS[kind]) for name in PLANNERS for kind in TOKENS
        }
        (folder / f"{rank}.json").write_text(json.dumps(found))
        (folder / "lost.json").write_text(json.dumps(lose(rank, impatient, patient)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
