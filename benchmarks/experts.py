# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers: ours beside every implementation it brings, and beside the dense limit.

    python -m benchmarks.experts [bars] [heap] [grid] [overhead] [--threads 2] [--processor-time]

bars        64 experts, 8 a token, width 512, width of an expert 64, 4,096 tokens, float32, forward and with backward.
            The limit is a dense gated network of as many products. Twice: as torch runs it (its own library for
            float32), and through the products that ours calls (oneDNN), which is the true limit of the processor.
heap        the same in a process whose allocator keeps what is freed, for all sides alike
grid        what is picked, against the best of eager, grouped_mm and batched_mm, from 1 to 16,384 tokens
overhead    a plain forward of a mid-size mixture beside one under the statistics collector, and one steered

Every round draws its own routing, experts unequally loved, and every case of the round gets it: a fixed one would hide
what a library prepares for every new number of rows. Ratios are within a round, medians over rounds. batched_mm copies
8 GiB of weights at 4,096 tokens and is run up to 16. --processor-time counts the seconds that the process had, which a
busy machine does not lengthen; with it, take one thread.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from anabranch.models.mixtures.fused import experts_forward, product
from anabranch.models.mixtures.picker import AUTO, auto_forward, choice

HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}
SIZES = {"fine": (64, 8, 512, 64), "coarse": (8, 2, 512, 1024), "many": (64, 1, 128, 512)}
"""Experts, of a token, width, width of an expert."""
BARS = {
    ("bars", False): (1.45, 1.7),
    ("bars", True): (1.6, 1.8),
    ("heap", False): (1.35, 1.3),
    ("heap", True): (1.5, 1.3),
}
TOKENS, ROUNDS, WARMUP = 4096, 9, 3
GRID = [4**i for i in range(8)]
PICKER_BAR, OVERHEAD_BAR = 1.05, 1.02
Run = Callable[[int], object]
"""One pass with the routing of a round."""


def rounds_of(cases: dict[str, Run], clock: Callable[[], float], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every case in every round; the order is drawn anew each round."""
    shuffler, names = random.Random(0), list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARMUP + rounds):
        shuffler.shuffle(names)
        for name in names:
            start = clock()
            cases[name](turn)
            if turn >= WARMUP:
                seconds[name].append(clock() - start)
    return seconds


def ratio(own: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


class Case:
    """A layer of experts, tokens, and a routing for every round."""

    def __init__(self, size: str, num_tokens: int, dtype: torch.dtype, gradient: bool):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.num_experts, self.top_k, width, hidden = SIZES[size]
        config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=hidden, num_experts=self.num_experts)
        config._experts_implementation = "eager"
        g = torch.Generator().manual_seed(0)
        self.experts: Any = Qwen3MoeExperts(config)
        for value in self.experts.parameters():
            value.data = (0.05 * torch.randn(value.shape, generator=g)).to(dtype)
        self.dense = [0.05 * torch.randn(*shape, generator=g) for shape in
                      ((2 * self.top_k * hidden, width), (width, self.top_k * hidden))]  # fmt: skip
        self.dense = [value.to(dtype).requires_grad_() for value in self.dense]
        self.x = torch.randn(num_tokens, width, generator=g).to(dtype)
        self.dy = torch.randn(num_tokens, width, generator=g).to(dtype)
        self.routings, self.gradient = [self.draw(g) for _ in range(WARMUP + ROUNDS)], gradient
        self.repeats = max(1, min(20, 2000 // (num_tokens * self.top_k)))

    def draw(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        logits = torch.randn(len(self.x), self.num_experts, generator=g)
        logits += 0.3 * torch.randn(self.num_experts, generator=g)
        weights, selected = logits.softmax(-1).topk(self.top_k)
        return selected, weights.to(self.x.dtype)

    def run(self, forward: Callable[..., Tensor]) -> Run:
        def passes(turn: int) -> None:
            for _ in range(self.repeats):
                selected, weights = self.routings[turn % len(self.routings)]
                if not self.gradient:
                    with torch.no_grad():
                        forward(self.x, selected, weights)
                    continue
                for value in (*self.experts.parameters(), *self.dense):
                    value.grad = None
                x, weights = self.x.detach().requires_grad_(), weights.detach().requires_grad_()
                forward(x, selected, weights).backward(self.dy)

        return passes

    def peers(self) -> dict[str, Run]:
        from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

        found = {"eager": self.run(self.experts)}
        found["grouped_mm"] = self.run(lambda *routed: grouped_mm_experts_forward(self.experts, *routed))
        if len(self.x) <= 16:
            found["batched_mm"] = self.run(lambda *routed: batched_mm_experts_forward(self.experts, *routed))
        return found

    def limits(self) -> dict[str, Run]:
        def dense(multiply: Callable[[Tensor, Tensor], Tensor]) -> Run:
            def forward(x: Tensor, *_: Tensor) -> Tensor:
                gate, up = multiply(x, self.dense[0]).chunk(2, -1)
                return multiply(silu(gate) * up, self.dense[1])

            return self.run(forward)

        return {"dense": dense(linear), "dense, our products": dense(ours)}


class OurLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return product(dy, weight), product(dy.T, x)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = OurLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def told(value: float, bar: float, at_least: bool = False) -> str:
    met = value >= bar if at_least else value <= bar
    return f"{value:6.2f}   bar {'>=' if at_least else '<='} {bar:.2f} {'met' if met else 'MISSED'}"


def bars(part: str, clock: Callable[[], float]) -> None:
    for gradient in (False, True):
        case = Case("fine", TOKENS, torch.float32, gradient)
        cases = case.limits() | case.peers()
        cases["anabranch"] = case.run(lambda *routed, case=case: experts_forward(case.experts, *routed))
        seconds = rounds_of(cases, clock)
        print(f"  {'forward and backward' if gradient else 'forward'}: of the dense limit, of its true limit, ms")
        for name, own in seconds.items():
            against = [ratio(own, seconds[limit]) for limit in ("dense", "dense, our products")]
            print(f"    {name:<22}{against[0]:6.2f} {against[1]:6.2f} {1e3 * statistics.median(own):8.1f}")
        limit, faster = BARS[part, gradient]
        print(f"    of the dense limit    {told(ratio(seconds['anabranch'], seconds['dense']), limit)}")
        least = min(ratio(seconds[name], seconds["anabranch"]) for name in ("eager", "grouped_mm"))
        print(f"    faster than the best  {told(least, faster, at_least=True)}")


def grid(clock: Callable[[], float]) -> None:
    """The best peer of a cell is the one with the least median."""
    for size, shape in SIZES.items():
        for gradient in (False, True):
            print(f"  {size} {shape}, {'forward and backward' if gradient else 'forward'}: picked, of the best peer")
            for num_tokens in GRID:
                case = Case(size, num_tokens, torch.float32, gradient)
                peers = case.peers()
                cases = peers | {AUTO: case.run(lambda *routed, case=case: auto_forward(case.experts, *routed))}
                seconds = rounds_of(cases, clock)
                best = min(peers, key=lambda name: statistics.median(seconds[name]))
                with torch.set_grad_enabled(gradient):
                    picked = choice(case.experts, case.x, *case.routings[0])
                against = told(ratio(seconds[AUTO], seconds[best]), PICKER_BAR)
                print(f"    {num_tokens:>6} tokens  {picked:<11} best {best:<11}{against}", flush=True)


def overhead(clock: Callable[[], float], rounds: int = 21) -> None:
    """12 layers of width 512, 32 experts of width 256, 4 a token, 8 x 256 tokens."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from anabranch.measure.experts.statistics import Collector
    from anabranch.models.mixtures.layers import mixture_layers
    from anabranch.models.mixtures.routing import changed, scaled

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=4, decoder_sparse_step=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    layers = mixture_layers(model)
    ids, mask = torch.randint(4096, (8, 256)), torch.ones(8, 256, dtype=torch.int64)
    collector = Collector(model, layers, ["a", "b"])
    labels, folds = torch.arange(8)[:, None] % 2, torch.arange(8) % 10
    off = torch.zeros(32, dtype=torch.bool)
    off[:4] = True

    def plain(_: int) -> None:
        with torch.no_grad():
            model.model(ids, attention_mask=mask)

    def collected(turn: int) -> None:
        with collector.collecting(labels, folds, mask):
            plain(turn)

    def steered(turn: int) -> None:
        with changed(layers, lambda _, triple: scaled(triple, off, 0.5)):
            plain(turn)

    seconds = rounds_of({"plain": plain, "again": plain, "statistics": collected, "steered": steered}, clock, rounds)
    print(f"  plain {1e3 * statistics.median(seconds['plain']):.0f} ms; the same again, which is the noise:"
          f" {ratio(seconds['again'], seconds['plain']):.3f}")  # fmt: skip
    for name in ("statistics", "steered"):
        value = ratio(seconds[name], seconds["plain"])
        print(f"  {name:<12}{value:.3f}   bar <= {OVERHEAD_BAR} {'met' if value <= OVERHEAD_BAR else 'MISSED'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="experts of transformers")
    parser.add_argument("parts", nargs="*", default=["bars", "heap", "grid", "overhead"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args([] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    for part in options.parts:
        if part == "heap" and not HEAP.items() <= os.environ.items():
            again = [sys.executable, "-m", "benchmarks.experts", "heap", f"--threads={options.threads}"]
            again += ["--processor-time"] * options.processor_time
            subprocess.run(again, env={**os.environ, **HEAP}, check=True)
            continue
        print(f"{part}: {options.threads} threads, {clock.__name__}", flush=True)
        if part in ("bars", "heap"):
            bars(part, clock)
        else:
            {"grid": grid, "overhead": overhead}[part](clock)


if __name__ == "__main__":
    main(sys.argv[1:])
