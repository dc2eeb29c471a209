# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: how many a launcher started, and how they find each other."""

import gc
import os
from typing import Any

import torch
from accelerate import PartialState


def launched() -> int:
    """How many processes torchrun or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Must be told to accelerate: processes on a machine without accelerators would otherwise not know each other."""
    return launched() > 1 and not torch.accelerator.is_available()


def processes() -> Any:
    """The state that all parts of a run share: `is_main_process`, `main_process_first()`, `wait_for_everyone()`."""
    return PartialState(cpu=on_cpu())


def disconnect() -> None:
    """
    Leaves the other processes, before the interpreter ends.

    A connection that is still open then, be it in a cycle of a wrapped model, has threads that give back tensors; one
    that asks a dying interpreter for its lock aborts the process (exit -6 after a finished run).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
