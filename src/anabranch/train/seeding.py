# SPDX-License-Identifier: Apache-2.0
"""Randomness as a function of (seed, step, rank), and deterministic operations for the length of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """One number from three, such that neighbours are unrelated: the mixer of SplitMix64 (Steele et al. 2014)."""
    mixed = 0
    for number in (seed, step, rank):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's default generators start from `seed` inside and are as before outside.

    Not torch.manual_seed: it queues a call for every absent accelerator, a quarter of a millisecond each time.
    """
    if device.type == "cpu":
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(state)
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
