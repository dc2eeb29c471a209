# SPDX-License-Identifier: Apache-2.0
"""Many small trainings side by side: one process a core, one thread a process."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import Any

import torch
import torch.multiprocessing

from anabranch.errors import AnabranchError
from anabranch.train.processes import LAUNCHED_WITH, launched

POLL_SECONDS = 0.5
_shared: Any = None


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    for name in LAUNCHED_WITH:  # what this process trains is its own: it is none of the launcher's
        os.environ.pop(name, None)
    torch.set_num_threads(1)  # spinning threads of neighbours cost several-fold
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can say nothing, and a training goes on for minutes."""
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_shared, item)


def num_workers(asked: int | None, num_items: int) -> int:
    """As many as cores by default, which the processes of a launcher on this machine share."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(min(asked or cores, num_items), 1)


def side_by_side(
    function: Callable[[Any, Any], Any],
    shared: Any,
    items: Sequence[Any],
    workers: int | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(shared, item)) as they finish; stops early, without waiting, once `stopped()`.

    `shared` is handed to every process once, its tensors without a copy. Under a launcher the work is always done in a
    process of its own: the one that asked answers the others, in `stopped`.

    Raises:
        AnabranchError: a process was killed, be it for want of memory; its item and those that waited are not done.
    """
    count = num_workers(workers, len(items))
    if count == 1 and launched() == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as beside others: the number of processes must not change a number
        try:
            for item in items:
                if stopped():
                    return
                yield item, function(shared, item)
        finally:
            torch.set_num_threads(threads)
        return
    torch.multiprocessing.set_sharing_strategy("file_system")
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(shared,))
    unfinished = {pool.submit(_call, function, item): item for item in items}
    try:
        while unfinished and not stopped():
            done, _ = wait(unfinished, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield unfinished.pop(future), future.result()
    except BrokenProcessPool as error:
        raise AnabranchError(
            "a process that did a part of the work was killed", expected=f"{count} that come to their end",
            received=f"{len(items) - len(unfinished)} of {len(items)} parts begun or done",
            hint="fewer workers need less memory; what was finished is kept, --resume goes on",
        ) from error  # fmt: skip
    finally:
        for process in list((pool._processes or {}).values()) if unfinished else []:
            process.terminate()  # stopped, interrupted or failed: nobody waits for the rest
        pool.shutdown(wait=not unfinished, cancel_futures=True)
