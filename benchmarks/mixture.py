# SPDX-License-Identifier: Apache-2.0
"""The mixture layer against the dense feed-forward network of a Vision Transformer: what routing itself costs.

Width 384, hidden 1536, 32 images of 50 tokens, float32, two threads, forward and backward. Gradients are set to None
before each round (`zero_grad(set_to_none=True)`), as in training, so every round allocates them anew. All cases compute
as many products as the dense network; what differs is the number of weights read and of gradients written, which
is what 32 experts in a batch of 32 images pay for. Ratios to the dense network of the same round, median over rounds.

Besides: the dense network plus nothing but the traffic of 32 experts (weights read twice, gradients written once), the
plainest mixture, a loop over experts as modules, and a stacked 3-D parameter sliced in a loop.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from anabranch.mixture import Context, ExpertBank, FixedTable, Mixture, Router, TableScore, route
from benchmarks._timing import compare

WIDTH, HIDDEN, BATCH, TOKENS = 384, 1536, 32, 50
THREADS = 2
BARS = {
    "8 experts, equal shares": 1.12,
    "32 experts, equal shares": 1.4,
    "8 experts, one cluster in the batch": 1.05,
    "extracted expert": 1.02,
}


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Loop(nn.Module):
    """What one writes first."""

    def __init__(self, bank: ExpertBank, images: int):
        super().__init__()
        self.bank, self.images = bank, images

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.bank.experts, x.split(self.images), strict=True)
        return torch.cat([expert(part) for expert, part in parts])


class Sliced(nn.Module):
    """Experts as slices of stacked weights: every slice's gradient is as large as the stack."""

    def __init__(self, bank: ExpertBank, images: int):
        super().__init__()
        self.bank, self.images = bank.stacked(), images

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank
        outputs = []
        for e, part in enumerate(x.split(self.images)):
            hidden = gelu(linear(part, bank.fc1_weight[e], bank.fc1_bias[e]))
            outputs.append(linear(hidden, bank.fc2_weight[e], bank.fc2_bias[e]))
        return torch.cat(outputs)


def traffic(bank: ExpertBank, dense: Callable[[], None]) -> Callable[[], None]:
    """A dense step, then its memory traffic were its weights those of all experts: no product could hide less."""

    def run() -> None:
        dense()
        weights = [parameter.detach() for parameter in bank.parameters() if parameter.ndim == 2]
        for _ in range(2):
            for weight in weights:
                weight.sum()
        _gradients = [torch.zeros_like(weight) for weight in weights]

    return run


def step(module: nn.Module, x: Tensor, gradient: Tensor, clusters: Tensor | None = None) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        if clusters is None:
            module(x).backward(gradient)
            return
        with route(module, Context(ids={"cluster": clusters})):
            module(x).backward(gradient)

    return run


def cases(dense: FeedForward, generator: torch.Generator, *, peers: bool) -> dict[str, Callable[[], None]]:
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, requires_grad=True)
    gradient = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    found = {"dense": step(dense, x, gradient)}
    for num_experts in (8, 32):
        bank = ExpertBank.from_template(dense, num_experts, noise=1e-2, generator=generator)
        fixed = Mixture(Router(FixedTable(torch.arange(num_experts), num_experts)), bank)
        images = BATCH // num_experts
        equal = torch.arange(num_experts).repeat_interleave(images)
        if peers:
            found[f"{num_experts} experts, traffic alone"] = traffic(bank, found["dense"])
            found[f"{num_experts} experts, loop over modules"] = step(Loop(bank, images), x, gradient)
            if num_experts == 8:  # with 32 it takes many seconds a round
                found[f"{num_experts} experts, slices of a stack"] = step(Sliced(bank, images), x, gradient)
            continue
        found[f"{num_experts} experts, equal shares"] = step(fixed, x, gradient, equal)
        if num_experts == 8:
            shuffled = equal[torch.randperm(BATCH, generator=generator)]
            drawn = torch.randint(8, (BATCH,), generator=generator)
            gate = TableScore(torch.randn(8, 64, generator=generator), 8, generator=generator)
            gate.gate.weight.data.copy_(gate.embedding)
            learned = Mixture(Router(gate), bank).eval()
            found["8 experts, equal shares, shuffled"] = step(fixed, x, gradient, shuffled)
            found["8 experts, uneven shares"] = step(fixed, x, gradient, drawn)
            found["8 experts, equal shares, learned gate"] = step(learned, x, gradient, equal)
            found["8 experts, one cluster in the batch"] = step(fixed, x, gradient, torch.full((BATCH,), 5))
            found["extracted expert"] = step(bank.extract(5), x, gradient)
    return found


def main(rounds: int = 9, threads: int = THREADS) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator, dense = torch.Generator().manual_seed(0), FeedForward()
        print(f"mixture: {WIDTH} x {HIDDEN}, {BATCH} images of {TOKENS} tokens, forward + backward, {threads} threads")
        for peers in (False, True):
            ratios = compare(cases(dense, generator, peers=peers), "dense", rounds=rounds)
            for name, (ratio, seconds) in ratios.items():
                bar = f"  bar <= {BARS[name]:.2f}: {'met' if ratio <= BARS[name] else 'MISSED'}" if name in BARS else ""
                print(f"  {name:<38} {ratio:6.2f} x  {seconds * 1e3:8.1f} ms{bar}")
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
