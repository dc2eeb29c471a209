# SPDX-License-Identifier: Apache-2.0
"""What `anabranch doctor --deep` adds: torch is imported, and every device computes a product that is known."""

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIZE = 512


def self_check() -> list[str]:
    """Prints a line a device; returns what is wrong."""
    started = time.perf_counter()
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    print(f"\ntorch         imported in {time.perf_counter() - started:.1f} s, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    problems = []
    for device in devices:
        name = "the cores" if device.type == "cpu" else str(device)
        try:
            name += "" if device.type == "cpu" else f" ({torch.cuda.get_device_name(device)})"
            problems += [f"{name}: {wrong}" for wrong in product(device)]
            print(f"{name}: {speed(device):.0f} billion operations a second")
        except RuntimeError as error:
            problems.append(f"{name}: {str(error).splitlines()[0]}")
    if torch.get_num_threads() > len(os.sched_getaffinity(0)):
        problems.append(f"{torch.get_num_threads()} threads on fewer cores: OMP_NUM_THREADS is too high")
    return problems


def product(device: "torch.device") -> list[str]:
    """x times its inverse permutation is x again, bit for bit; and gradients are those of the formula."""
    import torch

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(SIZE, generator=generator)
    x = torch.randn(SIZE, SIZE, generator=generator).to(device)
    swap = torch.eye(SIZE)[order].to(device)
    wrong = []
    if not torch.equal((swap @ x)[order.argsort().to(device)], x):
        wrong.append("a product with a permutation is not exact")
    y = x[0].clone().requires_grad_()
    (y**2).sum().backward()
    if y.grad is None or not torch.equal(y.grad, 2 * x[0]):
        wrong.append("the gradient of a square is wrong")
    return wrong


def speed(device: "torch.device") -> float:
    """Billions of additions and multiplications a second in products of this size, for half a second."""
    import torch

    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        float((x @ x)[0, 0])  # read back, so that an accelerator has really done it
        count += 1
    return count * 2 * SIZE**3 / (time.perf_counter() - started) / 1e9
