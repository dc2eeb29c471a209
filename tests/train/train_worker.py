# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny model in a process of its own, alone or under torchrun: `python train_worker.py MODE [FOLDER]`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny import TinyObjective, TinyStream

from anabranch.errors import AnabranchError, UsageError
from anabranch.train.loop import TrainConfig, train
from anabranch.train.processes import disconnect
from tests.many import connected

RANK = int(os.environ.get("RANK", "0"))


def until_stopped(run):
    """Trains for ever; tells each step."""
    config = TrainConfig(steps=10**9, batch_size=8, learning_rate=1e-3)
    train(TinyObjective(), TinyStream(), config, run, on_step=lambda step, logs: print(step, flush=True))


def together(folder):
    """What two processes must agree on; rank 0 prints the findings."""
    config = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2, save_every=5, log_every=4)
    lines = []

    def fresh():
        return TinyObjective(dropout=0.0, batch_norm=False)

    result = train(fresh(), TinyStream(), config, folder / "run", report=lines.append)
    findings = {"losses": result.losses, "lines_per_rank": len(lines)}

    def signal_to_the_second_process(step, logs):
        if RANK == 1 and step == 5:
            signal.raise_signal(signal.SIGTERM)

    try:
        train(fresh(), TinyStream(), config, folder / "stopped", on_step=signal_to_the_second_process)
    except AnabranchError as error:
        findings["stopped"] = [error.exit_code, str(error)]
    resumed = train(fresh(), TinyStream(), config, folder / "stopped", resume=True)
    findings["resumed_losses"] = resumed.losses
    findings["refused"] = refusals(fresh)
    return findings


def refusals(fresh):
    """A NaN in the rows of the second process only, and a batch that cannot be shared out."""

    class OneBadRow(TinyStream):
        def batch(self, step):
            batch = super().batch(step)
            if step == 3:
                batch["x"][-1, 0] = float("nan")
            return batch

    messages = []
    for stream, batch_size in ((OneBadRow(), 8), (TinyStream(7), 7)):
        objective = fresh()
        try:
            train(objective, stream, TrainConfig(steps=9, batch_size=batch_size, learning_rate=1e-2))
        except AnabranchError as error:
            messages.append([type(error) is UsageError, str(error), bool(torch.isfinite(objective.outer.weight).all())])
    return messages


def main(mode, folder="."):
    try:
        findings = until_stopped(Path(folder)) if mode == "until-stopped" else together(Path(folder))
    except AnabranchError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    disconnect()
    findings["connected"] = connected()
    (Path(folder) / f"rank-{RANK}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(*sys.argv[1:])
