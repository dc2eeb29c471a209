# SPDX-License-Identifier: Apache-2.0
"""One process of a command, or of a small piece of shared work: `main(WHAT, ...)`."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # which optimisers import: before the processes are forked, not in each

from anabranch import cli
from anabranch.errors import AnabranchError
from anabranch.jobs.together import first_alone, gathered, rank, share, summed
from anabranch.jobs.transfer import embed, measure
from anabranch.jobs.transfer.stages import publish_once
from anabranch.train.processes import disconnect
from anabranch.train.signals import StopFlag
from tests.many import connected

CHUNK = 32


def main(what, *arguments):
    torch.set_num_threads(1)
    if what == "command":
        embed.CHUNK = CHUNK
        code = cli.main(list(arguments))
        if left := connected():
            print(f"still connected: {left}", flush=True)
            sys.exit(1)
        sys.exit(code)
    try:
        (cells if what in ("cells", "stopped") else pieces)(what, Path(arguments[0]))
    except AnabranchError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    disconnect()


def pieces(what, folder):
    chunks = torch.arange(28, dtype=torch.float32).view(14, 2).split(3)
    if what == "lost":  # while the first one works
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        first_alone(lambda: time.sleep(60))
    if what == "failed":
        first_alone(lambda: 1 / 0 if rank() == 0 else None)
    if rank() == 1:
        time.sleep(0.5)  # what the first one writes is there when this one comes
    publish_once(folder / "once", lambda unfinished: (unfinished / "by").write_text(str(rank())))
    made = gathered(chunks, lambda rows: rows.cumsum(0) * 3)
    found = {
        "share": share(list(range(7))),
        "summed": summed(1.0, float(rank())),
        "first": first_alone(lambda: f"by {rank()}"),
        "gathered": None if made is None else made.tolist(),
    }
    (folder / f"{what}-{rank()}.json").write_text(json.dumps(found))


class Cell(NamedTuple):
    key: str


def cells(what, folder):
    """Five results that take no time; where it is stopped, the second process is told so after its first."""

    def one_by_one(work, shared, items, workers, stopped):
        for item in items:
            if stopped():
                return
            yield item, work(shared, item)

    def work(shared, cell):
        if what == "stopped" and rank() == 1:
            stop.received = signal.SIGTERM
        return {"seconds": 0.0, "made": f"{cell.key} by {rank()}"}

    measure.side_by_side = one_by_one
    all_cells = [Cell(f"cell-{i}") for i in range(5)]
    stop = StopFlag()
    results = measure.run_cells(folder / "models", all_cells, work, None, {"version": "1"}, 1, stop)
    (folder / f"{what}-{rank()}.json").write_text(json.dumps(results))
