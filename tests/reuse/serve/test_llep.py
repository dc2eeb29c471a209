# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.serve.exchange import workers
from anabranch.reuse.serve.llep import emulate, of_layer
from anabranch.reuse.serve.placement import Chunk, Plan, least_loaded, native

WORKER = Path(__file__).with_name("llep_worker.py")


def load():
    """The module llep_worker.py, whose numbers the processes draw as well."""
    spec = importlib.util.spec_from_file_location("llep_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The exit codes of both, and their folder. No launcher: one would end the process whose peer is lost."""
    folder = tmp_path_factory.mktemp("llep")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert (folder / "1.json").exists(), outputs
    return folder, [process.returncode for process in started], outputs


def plain(compute, matrices, hidden, selected, weights):
    """Token by token, slot by slot."""
    rows = []
    for t in range(len(hidden)):
        terms = [
            weights[t, k] * compute({n: v[e] for n, v in matrices.items()}, hidden[t : t + 1])[0]
            for k, e in enumerate(selected[t].tolist())
        ]
        rows.append(sum(terms))
    return torch.stack(rows)


def graded(function, matrices, hidden, selected, weights, target):
    """Output and gradients of sum(output * target), by name."""
    own = {name: value.clone().requires_grad_() for name, value in matrices.items()}
    x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    y = function(own, x, selected, w)
    (y * target).sum().backward()
    return {"output": y.detach(), "hidden": x.grad, "weights": w.grad} | {n: v.grad for n, v in own.items()}


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name], dtype=value.dtype).view(value.shape), value, rtol=0, atol=1e-10
        )


# one process


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["native", "least loaded", "all away", "all to the first"]), st.integers(1, 20))
def test_an_emulated_plan_is_the_plain_mixture_with_its_gradients(name, tokens):
    drawn = worker.drawn(tokens)
    counts = torch.bincount(drawn[2].flatten(), minlength=worker.EXPERTS).tolist()
    plan = worker.PLANNERS[name](counts, worker.OWNER, 2)
    found = graded(lambda m, x, s, w: emulate(plan, worker.compute, m, x, s, w), *drawn)
    close(found, graded(lambda m, x, s, w: plain(worker.compute, m, x, s, w), *drawn))


def test_experts_of_others_are_seen():
    """The comparison can fail: with each expert in the place of the next, output and gradients are others."""
    matrices, hidden, selected, weights, target = worker.drawn(12)
    counts = torch.bincount(selected.flatten(), minlength=worker.EXPERTS).tolist()
    plan = worker.PLANNERS["least loaded"](counts, worker.OWNER, 2)
    assert plan.transfers
    wrong = {name: value.roll(1, 0) for name, value in matrices.items()}
    found = graded(
        lambda m, x, s, w: emulate(plan, worker.compute, m, x, s, w), wrong, hidden, selected, weights, target
    )
    with pytest.raises(AssertionError):
        close(
            found,
            graded(lambda m, x, s, w: plain(worker.compute, m, x, s, w), matrices, hidden, selected, weights, target),
        )


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_plan_over_a_model_s_block_gives_what_the_block_gives(family):
    """GptOss holds its matrices transposed, its halves interleaved, and has biases."""
    layer = open_layers(tiny(family))[0]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, layer.hidden_size, generator=g)
    selected = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(24)])
    selected[:18, 0], selected[:18, 1] = 0, 1 + selected[:18, 1] % 7  # expert 0 is crowded
    weights = torch.rand(24, 2, generator=g)
    matrices, compute = of_layer(layer)
    counts = torch.bincount(selected.flatten(), minlength=8).tolist()
    plan = least_loaded(counts, [0, 0, 1, 1, 2, 2, 3, 3], 4, factor=1.0, threshold=1.0, min_chunk=1)
    assert plan.transfers
    found = emulate(plan, compute, matrices, hidden, selected, weights)
    block = layer.experts(hidden, selected, weights)
    torch.testing.assert_close(found, block, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(found.square().sum(), list(matrices.values()))
    theirs = torch.autograd.grad(block.square().sum(), list(matrices.values()))
    for name, mine, other in zip(matrices, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3, msg=name)


def test_a_plan_for_other_tokens_is_refused():
    matrices, hidden, selected, weights, _ = worker.drawn(6)
    with pytest.raises(UsageError, match=r"(?s)plan is for other tokens.*received: \[3, 0, 0, 0, 0\]"):
        emulate(Plan((Chunk(0, 0, 0, 3),), (0,) * 5, 1, 3), worker.compute, matrices, hidden, selected, weights)


def test_one_process_is_no_group():
    with pytest.raises(UsageError, match=r"(?s)no other process.*torchrun"), workers():
        pass


# two processes


@pytest.mark.parametrize("kind", ["uneven", "none here"])
@pytest.mark.parametrize("planner", ["native", "least loaded", "all away", "all to the first"])
def test_two_processes_give_the_output_and_gradients_of_one(two_processes, planner, kind):
    folder, *_ = two_processes
    ranks = [json.loads((folder / f"{rank}.json").read_text())[f"{planner}, {kind}"] for rank in range(2)]
    tokens = worker.TOKENS[kind]
    expected = graded(lambda m, x, s, w: plain(worker.compute, m, x, s, w), *worker.drawn(sum(tokens)))
    for rank, found in enumerate(ranks):
        rows = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
        mine = [e for e in range(worker.EXPERTS) if worker.OWNER[e] == rank]
        parts = {name: expected[name][rows] for name in ("output", "hidden", "weights")}
        close(found, parts | {name: expected[name][mine] for name in ("up", "down", "bias")})
    counts = torch.bincount(worker.drawn(sum(tokens))[2].flatten(), minlength=worker.EXPERTS).tolist()
    assert [found["rows"] for found in ranks] == worker.PLANNERS[planner](counts, worker.OWNER, 2).load
    assert float(expected["up"][0].abs().max()) > 0.1  # of an expert that travels
    assert float(expected["up"][3].abs().max()) == 0  # of one without a token


def test_the_plans_of_the_test_do_move_experts():
    for tokens in worker.TOKENS.values():
        counts = torch.bincount(worker.drawn(sum(tokens))[2].flatten(), minlength=worker.EXPERTS).tolist()
        moved = {name: len(plan(counts, worker.OWNER, 2).transfers) for name, plan in worker.PLANNERS.items()}
        assert moved["native"] == 0
        assert moved["least loaded"] > 0
        assert moved["all away"] == sum(count > 0 for count in counts)
        assert native(counts, worker.OWNER, 2).load != worker.PLANNERS["least loaded"](counts, worker.OWNER, 2).load


def test_a_lost_process_ends_in_an_error_and_not_in_waiting(two_processes):
    """One goes another way: the time limit. One dies before backward: at once."""
    folder, codes, outputs = two_processes
    assert codes == [0, 9], outputs
    late, dead = json.loads((folder / "lost.json").read_text())
    for message in (late, dead):
        assert message.startswith(
            "a process was lost in the middle of an exchange\n  expected: 2 processes that answer"
        )
    assert "imed out" in late
    assert "imed out" not in dead
