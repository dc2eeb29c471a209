# SPDX-License-Identifier: Apache-2.0
"""Work that the processes of a run share: each takes its part, and what comes out is what one process makes of all.

Waiting is never silent: a process that waits for another's long work answers a small sum every half a second, so that
one that is lost ends all of them at once, however long the work takes.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import AnabranchError, Stopped
from anabranch.jobs.parallel import POLL_SECONDS
from anabranch.train.processes import launched, naming_the_lost, processes
from anabranch.train.signals import StopFlag

Item, Result = TypeVar("Item"), TypeVar("Result")


def rank() -> int:
    return int(processes().process_index) if launched() > 1 else 0


def share(items: Sequence[Item]) -> list[Item]:
    """The first process takes items 0, P, 2 P, ..., the next one 1, P + 1, ...: neighbours are alike."""
    return list(items[rank() :: launched()])


def summed(*values: float) -> list[float]:
    """Over all processes; all have to ask at the same time."""
    if launched() == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=processes().device)
    with naming_the_lost():
        dist.all_reduce(told)
    found: list[float] = told.tolist()
    return found


class Beat:
    """Asked by every process again and again: was one of them told to stop, and how much is left in all?"""

    def __init__(self, left: int, stop: StopFlag):
        self.left, self.stop, self.stopped, self.left_in_all = left, stop, False, 1.0
        self()

    def __call__(self) -> bool:
        told, self.left_in_all = summed(float(self.stop.is_set), float(self.left))
        self.stopped = self.stopped or told > 0
        return self.stopped

    def until_all_are_done(self) -> None:
        while not self.stopped and not self() and self.left_in_all:
            time.sleep(POLL_SECONDS)


def first_alone(work: Callable[[], Result]) -> Result | None:
    """What `work` makes in the first process while the others wait for it; None in those."""
    if launched() == 1:
        return work()
    found: list[Result] = []
    failed: list[BaseException] = []
    worker = threading.Thread(target=_work, args=(work, torch.get_num_threads(), found, failed), daemon=True)
    if rank() == 0:
        worker.start()
    state = [0.0, 0.0, 0.0]
    while not any(state):
        if rank() == 0:
            worker.join(POLL_SECONDS)
        stopped = bool(failed) and isinstance(failed[0], Stopped)
        state = summed(float(bool(found)), float(bool(failed)), float(stopped))
    if failed:
        raise failed[0]
    if state[2]:
        raise Stopped("stopped on request, as the first process was")
    if state[1]:
        raise AnabranchError("the first process failed", hint="its output says why")
    return found[0] if found else None


def _work(work: Callable[[], Any], threads: int, found: list[Any], failed: list[BaseException]) -> None:
    torch.set_num_threads(threads)  # a new thread would count processors anew, and sum in another order
    try:
        found.append(work())
    except BaseException as error:
        failed.append(error)


def gathered(chunks: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> Tensor | None:
    """`make` of every chunk, one after the other, in the first process; None in the others.

    A chunk is made by one process as one process would make it, so the result is the same bit for bit.
    """
    mine = iter(map(make, share(chunks)))
    if launched() == 1:
        return torch.cat(list(mine))
    with naming_the_lost():
        return _sent(mine) if rank() else torch.cat(list(_received(mine, len(chunks))))


def _sent(mine: Iterator[Tensor]) -> None:
    for chunk in mine:
        chunk = chunk.to(processes().device).contiguous()
        dist.send(torch.tensor(chunk.shape, device=chunk.device), 0)
        dist.send(chunk, 0)


def _received(mine: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for number in range(count):
        source = number % launched()
        if source == 0:
            yield next(mine)
            continue
        shape = torch.empty(2, dtype=torch.int64, device=processes().device)
        dist.recv(shape, source)
        chunk = torch.empty(*shape.tolist(), device=shape.device)
        dist.recv(chunk, source)
        yield chunk.cpu()
