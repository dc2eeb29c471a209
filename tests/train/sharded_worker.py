# SPDX-License-Identifier: Apache-2.0
"""One process of sharded training: `python sharded_worker.py MODE FOLDER [NAME ...]`, under torchrun or by hand."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # which optimisers import: before the processes are forked, not in each
import torch.distributed.fsdp
from safetensors.torch import save_file
from sharded_tasks import BATCH_NORM, ROWS, make

from anabranch.errors import AnabranchError, Stopped
from anabranch.train import sharded_checkpoint
from anabranch.train.checkpoint import Checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.optimizer import build_optimizer
from anabranch.train.processes import disconnect, processes
from anabranch.train.sharded import Shards, local
from tests.many import connected

STEPS = 3


def rank():
    return int(os.environ["RANK"])


def config(**more):
    """AdamW would make large steps of what rounding leaves of a gradient that is zero, as before a batch norm."""
    settings = {"steps": STEPS, "batch_size": ROWS, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    return TrainConfig(**(settings | {"sharding": "full"} | more))


def equal(folder, names):
    """Each trainer, sharded; those with batch statistics plainly as well."""
    found = {}
    for name in names:
        given = {"optimizer": "sgd"} if name in BATCH_NORM else {}
        found[name] = trained(name, folder / f"{name}.full.safetensors", **given)
        if name in BATCH_NORM:
            found[f"{name} plain"] = trained(name, folder / f"{name}.none.safetensors", sharding="none", **given)
    return found


def trained(name, file, **more):
    objective, stream = make(name)
    before = {key: id(parameter) for key, parameter in objective.named_parameters()}
    kinds = [type(module) for module in objective.modules()]
    hooks = count_hooks(objective)
    losses = train(objective, stream, config(**more)).losses
    as_it_came = (
        before == {key: id(parameter) for key, parameter in objective.named_parameters()}
        and kinds == [type(module) for module in objective.modules()]
        and hooks == count_hooks(objective)
    )
    if rank() == 0:
        save_file({key: value.contiguous().clone() for key, value in objective.state_dict().items()}, file)
    return {"losses": losses, "as_it_came": as_it_came}


def count_hooks(objective):
    return [{k: len(v) for k, v in vars(m).items() if "_hooks" in k} for m in objective.modules()]


LONG = {"steps": 12, "warmup_steps": 2, "save_every": 5, "log_every": 4, "max_grad_norm": None}


def life(folder, names):
    """A run that a signal stops, one with a bad row, what a process holds; then `names` are runs to resume."""
    world = int(os.environ["WORLD_SIZE"])
    run = folder / f"from-{world}"
    return {
        "stopped": stopped(run, world),
        "refused": refused(),
        "held": held(),
        "resumed": {name: resumed(folder / name) for name in names},
        "failed": failed(folder / f"failing-{world}", world),
    }


def stopped(run, world):
    """Of the last process alone, after its fifth step."""
    objective, stream = make("tiny")

    def signal_to_one(step, logs):
        if rank() == world - 1 and step == 5:
            signal.raise_signal(signal.SIGTERM)

    try:
        train(objective, stream, config(**LONG), run, on_step=signal_to_one)
    except Stopped as error:
        return [error.exit_code, str(error), float(objective.outer.weight.detach().sum())]


def resumed(run):
    objective, stream = make("tiny")
    lines = []
    losses = train(objective, stream, config(**LONG), run, resume=True, report=lines.append).losses
    return {"losses": losses, "lines": lines}


def failed(run, world):
    """What every process says where one cannot save or load, and what is left afterwards."""
    processes()
    dist = torch.distributed
    tensors = {str(number): torch.full((6,), float(number)) for number in range(8)}  # each process writes some

    def save(step, folder=run):
        sharded_checkpoint.save_sharded(folder, Checkpoint(step=step, model=tensors, optimizer={}, config={}))

    save(1)
    writer = torch.distributed.checkpoint.HuggingFaceStorageWriter
    faults = {"part": (writer, "write_data"), "digest": (sharded_checkpoint, "digest_of")}
    found = {}
    for name, (owner, attribute) in faults.items():
        real = getattr(owner, attribute)
        if rank() == world - 1:
            setattr(owner, attribute, full)
        found[name] = message(lambda: save(2))
        setattr(owner, attribute, real)
    blocked = run / "blocked"
    if rank() == 0:
        blocked.mkdir()
        (blocked / "checkpoints").write_text("in the way")
    dist.barrier()
    found["folder"] = message(lambda: save(1, blocked))
    if rank() == 0:
        (run / "checkpoints" / "step-000001" / "state.json").write_text("{")
    dist.barrier()
    found["nothing left"] = message(lambda: sharded_checkpoint.choose(run))
    return found | {"names": sorted(path.name for path in (run / "checkpoints").iterdir())}


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def message(work):
    try:
        work()
    except AnabranchError as error:
        return str(error)


def refused():
    """A NaN in the rows of the last process only."""
    objective, stream = make("tiny")

    class OneBadRow:
        def batch(self, step):
            batch = stream.batch(step)
            if step == 1:
                batch["x"][-1, 0] = float("nan")
            return batch

    try:
        train(objective, OneBadRow(), config())
    except AnabranchError as error:
        return [str(error), bool(torch.isfinite(objective.outer.weight).all())]


def held():
    """Bytes of parameters, gradients and moments in this process after a step, by hand."""
    processes()
    objective, stream = make("tiny")
    shards = Shards(objective, torch.device("cpu"))
    optimizer = build_optimizer(objective, config())
    share = ROWS // int(os.environ["WORLD_SIZE"])
    objective({name: rows[:share] for name, rows in stream.batch(0).items()})["loss"].backward()
    shards.forget_unused([float(name in shards.used) for name in shards.order])
    optimizer.step()
    parameters = list(objective.parameters())
    found = {
        "parameters": sum(local(p).nbytes for p in parameters),
        "gradients": sum(local(p.grad).nbytes for p in parameters if p.grad is not None),
        "moments": sum(local(s).nbytes for state in optimizer.state.values() for k, s in state.items() if k != "step"),
    }
    shards.restore(torch.device("cpu"))
    return found | {"afterwards": sum(p.nbytes for p in objective.parameters())}


MODES = {"equal": equal, "life": life}


def main(mode, folder, *names):
    torch.set_num_threads(1)
    try:
        findings = MODES[mode](Path(folder), names)
    except AnabranchError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    disconnect()
    findings["connected"] = connected()
    (Path(folder) / f"{mode}-{rank()}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(*sys.argv[1:])
