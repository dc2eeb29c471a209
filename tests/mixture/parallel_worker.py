# SPDX-License-Identifier: Apache-2.0
"""One process of expert parallelism: `main(FOLDER)` writes outputs and gradients of its rows for every case."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import (
    Context,
    ExpertBank,
    LinearScore,
    Mixture,
    ModuleBank,
    Router,
    StackedBank,
    TableScore,
    TopK,
    balance_loss,
    mixtures,
    prob,
    renormalised,
    route,
    routings,
)
from anabranch.mixture.expert_parallel import ExpertParallel, average_gradients

EXPERTS, WIDTH, TOKENS = 5, 6, 3
SAMPLES = {2: {"even": [4, 4], "uneven": [7, 1], "none here": [8, 0], "none first": [0, 8]},
           4: {"even": [2, 2, 2, 2], "uneven": [5, 0, 2, 1], "none here": [0, 8, 0, 0]}}  # fmt: skip
OWNERS = {2: {"in order": [0, 0, 0, 1, 1], "mixed": [1, 0, 1, 0, 1], "all with one": [1] * 5},
          4: {"in order": [0, 0, 1, 2, 3], "mixed": [3, 1, 3, 0, 1], "all with one": [2] * 5}}  # fmt: skip
BANKS = ("modules", "packed", "stacked", "blocks", "samples")


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Model(nn.Module):
    """Two mixtures, one behind the other, so that the ways back of both have to be taken in one order."""

    def __init__(self, kind):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.inlet = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(mixture(kind, seed) for seed in (0, 1))
        self.double()

    def forward(self, x):
        x = self.inlet(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def mixture(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = [Expert() for _ in range(EXPERTS)]
    bank = {"packed": ExpertBank, "stacked": lambda e: ExpertBank(e).stacked()}.get(kind, ModuleBank)(experts)
    if kind == "samples":
        centroids = torch.randn(6, 4, generator=generator)
        return Mixture(Router(TableScore(centroids, EXPERTS, generator=generator), weigh=prob), bank)
    score = LinearScore(WIDTH, EXPERTS, generator=generator)
    router = Router(score, select=TopK(2), weigh=renormalised)
    universal = Expert() if kind == "blocks" else None
    return Mixture(router, bank, universal=universal)


def data(kind):
    """Of all processes together; experts 3 and 4 are crowded, and one may be left without a row."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(8, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randn(8, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return x, target, torch.arange(8) % 6


def step(model, rows, average=False):
    """Output of these rows, and the gradients of the mean over all rows, times processes where these are a part."""
    x, target, cluster = data(None)
    x = x[rows].clone().requires_grad_()
    with route(model, Context(ids={"cluster": cluster[rows]})):
        y = model(x)
    world = dist.get_world_size() if average else 1
    balance = torch.stack([balance_loss(r, "global") for r in routings(model).values()]).sum()
    ((y * target[rows]).sum() / 8 * world + balance).backward()
    if average:
        average_gradients(model)
    return y.detach(), x.grad / world


def named_gradients(model):
    """Of experts by their number in the whole layer."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def parallel(model, owner):
    for i, layer in enumerate(model.layers):
        model.layers[i] = ExpertParallel(layer, owner)
    return model


def by_number(model):
    """Expert gradients as `layer.expert.tensor`, the others by their own names."""
    found = {}
    for i, layer in enumerate(model.layers):
        bank = layer.experts if isinstance(layer, ExpertParallel) else layer.bank
        numbers = layer.own if isinstance(layer, ExpertParallel) else range(EXPERTS)
        for place, number in enumerate(numbers):
            for name, gradient in of_expert(bank, place).items():
                found[f"{i}.{number}.{name}"] = gradient
    common = {n: p.grad for n, p in model.named_parameters() if "bank" not in n and ".experts." not in n}
    return found | {name: gradient for name, gradient in common.items() if gradient is not None}


def of_expert(bank, place):
    if isinstance(bank, StackedBank):
        return {n: p.grad[place] for n, p in bank.stacks.items() if p.grad is not None}
    return {n: p.grad for n, p in bank.tensors(place).items() if p.grad is not None}


def owned(layer):
    try:
        return layer.bank.num_experts
    except UsageError:
        return 0


def main(folder):
    rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for kind in BANKS:
        for how, samples in SAMPLES[world].items():
            for placed, owner in OWNERS[world].items():
                start = sum(samples[:rank])
                model = parallel(Model(kind), owner)
                y, x_grad = step(model, torch.arange(start, start + samples[rank]), average=True)
                case = f"{kind}|{how}|{placed}"
                found |= {f"{case}|output": y, f"{case}|input": x_grad}
                found |= {f"{case}|{name}": gradient for name, gradient in by_number(model).items()}
    model = parallel(Model("modules"), OWNERS[world]["mixed"])
    for layer in model.layers:
        with torch.no_grad():
            for place, number in enumerate(layer.own):
                layer.bank.tensors(place)["fc1.bias"].fill_(number)
    plain = [layer.whole() for layer in mixtures(model).values()]
    found |= {f"whole|{i}": torch.stack([layer.bank.tensors(e)["fc1.bias"] for e in range(EXPERTS)])
              for i, layer in enumerate(plain)}  # fmt: skip
    refused = False
    try:
        ExpertParallel(mixture("modules", 0), [0, 0, 0, 0, world])
    except UsageError:
        refused = True
    found["refused"] = torch.tensor(refused)
    found["owned"] = torch.tensor(owned(ExpertParallel(mixture("modules", 0), [1] * EXPERTS)))
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
