# SPDX-License-Identifier: Apache-2.0
"""Randomness as a function of (seed, step, rank), and deterministic operations for the length of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """One number from three, such that neighbours are unrelated."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's default generators start from `seed` inside and are as before outside.

    Not torch.manual_seed: it queues a call for every absent accelerator, a quarter of a millisecond each time.
    """
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    accelerator = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[accelerator.current_device()], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        accelerator.manual_seed(seed)
        yield


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Refuse operations without a deterministic form; `enabled=False` leaves torch's settings alone."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a CUDA device is first used
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic  # its one setting is a property of the module, unknown to type checkers
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    # Not torch.use_deterministic_algorithms: it imports the compiler, two seconds of start-up.
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
