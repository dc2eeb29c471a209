# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: how many a launcher started, how they find each other, and what is said where one is lost.

ANABRANCH_TIMEOUT: seconds that one process waits for another that answers no more, 600 if it is not set. One that is
killed is noticed at once, for its connections close; the limit is for one that hangs, or a machine without power.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from anabranch.errors import AnabranchError, UsageError

if torch.distributed.is_available():
    # Its defaults are the group of the moment: loaded later, as by DDP, they would hold a connection to the very end.
    import torch.distributed.nn.functional

TIMEOUT = "ANABRANCH_TIMEOUT"
SECONDS = 600.0
LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
SIGNS_OF_LOSS = (
    "gloo/transport",
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "timed out waiting",
    "application timeout caused pair closure",
    "connection was likely closed",
    "remote process exited",
    "watchdog caught collective operation timeout",
)
"""In the messages of torch's back ends, which have no type of their own for it."""


def launched() -> int:
    """How many processes torchrun or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Must be told to accelerate: processes on a machine without accelerators would otherwise not know each other."""
    return launched() > 1 and not torch.accelerator.is_available()


def time_limit() -> timedelta:
    """How long a process waits for another one."""
    given = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UsageError(f"{TIMEOUT} is no time limit", expected="seconds, such as 600", received=given)
    return timedelta(seconds=seconds)


def processes() -> Any:
    """The state that all parts of a run share: `is_main_process`, `main_process_first()`, `wait_for_everyone()`."""
    return PartialState(cpu=on_cpu(), timeout=time_limit())


def disconnect() -> None:
    """
    Leaves the other processes, before the interpreter ends.

    A connection that is still open then, be it in a cycle of a wrapped model, has threads that give back tensors; one
    that asks a dying interpreter for its lock aborts the process (exit -6 after a finished run). A mesh of sharded
    weights lies in torch's own caches to the end: it is made to let go of the connection.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        if devices := sys.modules.get("torch.distributed.device_mesh"):
            for mesh in [kept for kept in gc.get_objects() if type(kept) is devices.DeviceMesh]:
                getattr(mesh, "_pg_registry", {}).clear()
        torch.distributed.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error of torch means that another process is gone, or did not answer in time."""
    known = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, known) or any(sign in text for sign in SIGNS_OF_LOSS))


@contextmanager
def naming_the_lost(hint: str | None = None) -> Iterator[None]:
    """An error of the connections is told as what it is: another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if launched() < 2 or not lost(error):
            raise
        raise lost_process(error, hint) from error


def lost_process(error: BaseException, hint: str | None = None) -> AnabranchError:
    return AnabranchError(
        "another process of this run was lost",
        expected=f"{launched()} processes that answer within {time_limit().total_seconds():g} s ({TIMEOUT})",
        received=str(error).splitlines()[0],
        hint="; ".join(part for part in ("look at the output of the other processes", hint) if part),
    )
