# SPDX-License-Identifier: Apache-2.0
"""One process of a run in which one is lost: `main(RUN, SHARDING, HOW, WHEN)`, or `python lost_worker.py ...`.

WHEN is `step` or `save`, the seventh step or the second save, or another one: `step-3`, `save-1`.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # which optimisers import: before the processes are forked, not in each
import torch.distributed.fsdp
from tiny import TinyObjective, TinyStream

from anabranch.errors import AnabranchError
from anabranch.train import publish, sharded_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.processes import TIMEOUT, disconnect

HOW = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class Fatal(TinyObjective):
    """Loses this process in the middle of a step, when the others wait for its gradient."""

    fatal = None
    step = 7
    seen = 0

    def forward(self, batch):
        found = super().forward(batch)
        self.seen += 1
        if self.fatal is not None and self.seen == self.step:
            os.kill(os.getpid(), self.fatal)
        return found


def main(run, sharding, how="", when=""):
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault(TIMEOUT, "4" if how == "stopped" else "60")  # the end of a killed one is noticed at once
    objective = Fatal(dropout=0.3, batch_norm=False)
    when, _, number = when.partition("-")
    if how and when == "step" and rank == world - 1:
        objective.fatal, objective.step = HOW[how], int(number or 7)
    if how and when == "save":
        lose_while_saving(HOW[how], rank, world, sharding, int(number or 2))
    config = TrainConfig(
        steps=12, batch_size=8, learning_rate=1e-2, save_every=5, log_every=4, sharding=sharding
    )  # fmt: skip
    try:
        train(objective, TinyStream(), config, Path(run), resume=Path(run).exists())
    except AnabranchError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    disconnect()


def lose_while_saving(number, rank, world, sharding, save):
    """At one save: the first process when everything but the manifest is written; of shards the last one's."""
    saves = []

    def fatal(function):
        def wrapped(*arguments):
            saves.append(None)
            if len(saves) == save:
                os.kill(os.getpid(), number)
            return function(*arguments)

        return wrapped

    if sharding == "full" and rank == world - 1:
        sharded_checkpoint.gathered_digests = fatal(sharded_checkpoint.gathered_digests)
    if sharding == "none" and rank == 0:
        publish._seal = fatal(publish._seal)


if __name__ == "__main__":
    main(*sys.argv[1:])
