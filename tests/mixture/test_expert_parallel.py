# SPDX-License-Identifier: Apache-2.0
"""Experts that lie with several processes give the output and the gradients of one process that has them all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import LinearScore, Mixture, ModuleBank, Router
from anabranch.mixture.expert_parallel import ExpertParallel, average_gradients
from tests.many import load, run_many

WORKER = Path(__file__).with_name("parallel_worker.py")
worker = load(WORKER)
CASES = [(w, k, h, p) for w in (2, 4) for k in worker.BANKS for h in worker.SAMPLES[w] for p in worker.OWNERS[w]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    found = {}
    for world in (2, 4):
        folder = tmp_path_factory.mktemp(f"parallel-{world}")
        codes, said = run_many(world, WORKER, folder)
        assert codes == [0] * world, said
        found[world] = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def alone():
    """By kind of bank: output, gradient of the input, gradients by name."""
    found = {}
    for kind in worker.BANKS:
        model = worker.Model(kind)
        y, x_grad = worker.step(model, torch.arange(8))
        found[kind] = {"output": y, "input": x_grad} | worker.by_number(model)
    return found


@pytest.mark.parametrize(("world", "kind", "how", "placed"), CASES)
def test_outputs_and_gradients_are_those_of_one_process(processes, alone, world, kind, how, placed):
    """Of the router, the experts, the universal expert, what lies before them, and the input; in double precision."""
    expected, samples = alone[kind], worker.SAMPLES[world][how]
    prefix = f"{kind}|{how}|{placed}|"
    seen = set()
    for rank, found in enumerate(processes[world]):
        own = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        rows = slice(sum(samples[:rank]), sum(samples[: rank + 1]))
        for name, value in own.items():
            part = expected[name][rows] if name in ("output", "input") else expected[name]
            torch.testing.assert_close(
                value, part, atol=1e-12, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
        seen |= own.keys()
    assert seen == expected.keys()


def test_the_cases_can_tell_experts_apart_and_move_rows(alone):
    """Gradients of neighbours differ, and under every placement but one process's own some rows have to travel."""
    gradients = alone["modules"]
    for left in range(3):
        assert not torch.allclose(gradients[f"0.{left}.fc1.weight"], gradients[f"0.{left + 1}.fc1.weight"], atol=1e-6)
    assert gradients["layers.0.router.score.gate.weight"].abs().max() > 1e-6


@pytest.mark.parametrize("world", [2, 4])
def test_the_whole_layer_comes_back_to_every_process(processes, world):
    numbers = torch.arange(worker.EXPERTS, dtype=torch.float64)[:, None].expand(-1, 8)
    for found in processes[world]:
        for layer in ("whole|0", "whole|1"):
            assert torch.equal(found[layer], numbers)


@pytest.mark.parametrize("world", [2, 4])
def test_an_owner_that_is_not_there_is_refused(processes, world):
    assert all(bool(found["refused"]) for found in processes[world])


@pytest.mark.parametrize("world", [2, 4])
def test_a_process_without_experts_has_no_bank(processes, world):
    assert [int(found["owned"]) for found in processes[world]] == [
        worker.EXPERTS * (rank == 1) for rank in range(world)
    ]


# what is the same in a group of one process


@pytest.fixture
def alone_in_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def narrowing():
    """Experts that give back fewer numbers than they get."""
    score = LinearScore(6, 2, generator=torch.Generator().manual_seed(0))
    return Mixture(Router(score), ModuleBank([nn.Linear(6, 3), nn.Linear(6, 3)]))


@pytest.mark.usefixtures("alone_in_a_group")
def test_experts_that_change_the_shape_of_rows_are_refused():
    layer = ExpertParallel(narrowing(), [0, 0])
    with pytest.raises(UsageError, match="change the shape of their rows"):
        layer(torch.randn(2, 3, 6))


@pytest.mark.usefixtures("alone_in_a_group")
def test_only_what_has_a_gradient_somewhere_gets_the_mean_one():
    model = ExpertParallel(worker.mixture("blocks", 0), [0] * worker.EXPERTS)
    own, gate = next(model.experts.parameters()), model.router.score.gate.weight
    own.grad, gate.grad = torch.ones_like(own), torch.ones_like(gate)
    average_gradients(model)
    assert torch.equal(gate.grad, torch.ones_like(gate))
    assert all(parameter.grad is None for parameter in model.universal.parameters())
    for parameter in (*model.router.parameters(), *model.universal.parameters()):
        parameter.requires_grad_(False)
    average_gradients(model)  # experts alone learn: nothing is in common
    assert torch.equal(own.grad, torch.ones_like(own))


@pytest.mark.usefixtures("alone_in_a_group")
def test_the_whole_layer_learns_again():
    """Put back for another stage of training, its experts are not frozen."""
    plain = ExpertParallel(worker.mixture("packed", 0), [0] * worker.EXPERTS).whole()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not ExpertParallel(worker.mixture("packed", 0).eval(), [0] * worker.EXPERTS).whole().training
