# SPDX-License-Identifier: Apache-2.0
"""Processes on CPUs that exchange rows, and an error where one of them is lost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from anabranch.errors import AnabranchError, UsageError
from anabranch.train.processes import disconnect, launched, processes


@contextmanager
def workers(timeout: float = 60.0) -> Iterator[dist.ProcessGroup]:
    """The processes that torchrun started, as a group in which nobody waits longer than `timeout` seconds.

    All connections of this process end with it, also those of other groups.
    """
    if launched() < 2:
        raise UsageError("there is no other process", expected="two or more", received=launched(), hint="use torchrun")
    processes()
    try:
        yield dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    finally:
        disconnect()


def exchange(sent: Tensor, out: Sequence[int], into: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """`out[p]` rows to process p, `into[p]` rows from it.

    Raises:
        AnabranchError: a process died, or did not come within the time limit of the group.
    """
    received = sent.new_empty(sum(into), *sent.shape[1:])
    try:
        dist.all_to_all_single(received, sent.contiguous(), list(into), list(out), group=group)
    except RuntimeError as error:
        raise AnabranchError(
            "a process was lost in the middle of an exchange", expected=f"{len(out)} processes that answer",
            received=str(error).splitlines()[0], hint="look at the output of the other processes",
        ) from error  # fmt: skip
    return received
