# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded training: each process writes what it holds, and any number of processes reads it.

torch.distributed.checkpoint decides who writes what, and which part goes where on loading; its safetensors storage
writes `shard-00001-model-00001-of-00001.safetensors`, one a process, with the offsets of all parts in the header. Its
usual storage keeps a pickle beside the tensors and is not used. The folder is published as every other (publish.py):
complete or invisible, sha-256 of each file, manifest last. Tensors are called as in plain checkpoints, so either kind
of training reads either kind. Every process must see the folder: several machines need a file system that they share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor, nn

from anabranch.errors import AnabranchError, UsageError
from anabranch.swap import DISK_ERRORS
from anabranch.train.checkpoint import (
    SHARDED,
    Checkpoint,
    Loaded,
    Skipped,
    check_complete,
    check_keep,
    of_state,
    prune,
    verified,
    walk_back,
    write_state,
)
from anabranch.train.processes import processes
from anabranch.train.publish import Digest, Digests, digest_of, read_json, replace_folder
from anabranch.train.run_folder import differing_keys

__all__ = ["load_sharded", "save_sharded"]

dcp: Any = torch.distributed.checkpoint  # type checkers take its names for private ones
NOTHING, FAILED, DONE = -1, -2, 0
DIGEST_BYTES = 40
"""Eight for the size of a file, 32 for its sha-256; all zero where a process wrote none."""


# Saving -------------------------------------------------------------------------------------------------------------


def save_sharded(run: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """`save_checkpoint` by all processes together; it is published when the first one returns, or all raise."""
    check_keep(keep)
    if overlap := checkpoint.model.keys() & checkpoint.optimizer.keys():
        raise AnabranchError("a parameter is called as a statistic of another", received=min(overlap))
    target = run / "checkpoints" / f"step-{checkpoint.step:06d}"
    if dist.get_rank() == 0:
        lead(target, checkpoint)
        prune(run, checkpoint.step, keep)
    else:
        follow(target, checkpoint)
    return target


def lead(target: Path, checkpoint: Checkpoint) -> None:
    """The first process: it owns the folder and tells the others its name, and then how it ended."""

    def write(folder: Path) -> Digests:
        tell(int(folder.name.rpartition("-")[2], 16))
        digests = write_parts(folder, checkpoint)
        names = {"model": sorted(checkpoint.model), "optimizer": sorted(checkpoint.optimizer)}
        write_state(folder, checkpoint, **{SHARDED: names})
        return digests

    try:
        replace_folder(write, target)
    except AnabranchError:
        tell(FAILED)  # in place of the name, or of the good end
        raise
    tell(DONE)


def follow(target: Path, checkpoint: Checkpoint) -> None:
    token = tell()
    if token != FAILED:
        try:
            write_parts(target.parent / f".{target.name}.new-{token:08x}", checkpoint)
        except AnabranchError:
            tell()
            raise
        token = tell()
    if token == FAILED:
        raise AnabranchError(f"the first process could not write {target}", hint="its output says why")


def tell(value: int = 0) -> int:
    """What the first process says."""
    told = torch.tensor([value], device=processes().device)
    dist.broadcast(told, 0)
    return int(told)


def write_parts(folder: Path, checkpoint: Checkpoint) -> Digests:
    """The file of this process; the digests of all of them. A failure of one is an error in every process."""
    tensors = {**checkpoint.model, **checkpoint.optimizer}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise AnabranchError(f"could not write {folder.parent}: {cause}", hint="make room or another disk") from error
    return gathered_digests(folder)


def gathered_digests(folder: Path) -> Digests:
    mine = folder / file_of(dist.get_rank())
    own = bytes(DIGEST_BYTES)
    try:
        if mine.exists():  # a process whose every part is empty writes none
            found = digest_of(mine)
            own = found.bytes.to_bytes(8, "big") + bytes.fromhex(found.sha256)
    except DISK_ERRORS:
        own = bytes([255]) * DIGEST_BYTES
    sent = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(processes().device)
    came = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(came, sent)
    digests = Digests()
    for rank, row in enumerate(came):
        raw = bytes(row.tolist())
        if raw[0] == 255:
            raise AnabranchError(f"{file_of(rank)} could not be read again after it was written")
        if any(raw):
            digests[file_of(rank)] = Digest(int.from_bytes(raw[:8], "big"), raw[8:].hex())
    return digests


def file_of(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


# Loading ------------------------------------------------------------------------------------------------------------


def load_sharded(run: Path, objective: nn.Module) -> Loaded | None:
    """Into the shards of the objective, from either kind of checkpoint; the result holds the optimiser's tensors.

    The first process chooses: it walks back to the newest that verifies, and the others read the same one.
    """
    path, skipped = choose(run)
    if path is None:
        return None
    state = read_json(path / "state.json")
    reader = dcp.HuggingFaceStorageReader(str(path))
    known: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    if SHARDED in state:
        check_complete(known, [*state[SHARDED]["model"], *state[SHARDED]["optimizer"]])
    model: dict[str, Tensor] = objective.state_dict()
    parameters = dict(objective.named_parameters())
    optimizer = {name: room_for(name, known[name], parameters) for name in known.keys() - names_of_model(state, model)}
    check_same_model(known, model, optimizer)
    dcp.load({**model, **optimizer}, storage_reader=reader)
    return Loaded(of_state(state, {}, optimizer), path, skipped)


def choose(run: Path) -> tuple[Path | None, tuple[Skipped, ...]]:
    if dist.get_rank() == 0:
        try:
            found = walk_back(run, verified)
        except AnabranchError:
            tell(FAILED)
            raise
        tell(NOTHING if found is None else found[0]["step"])
        return (None, ()) if found is None else (found[1], found[2])
    step = tell()
    if step == FAILED:
        raise AnabranchError(f"no checkpoint in {run / 'checkpoints'} can be loaded", hint="the first process says why")
    return (None if step == NOTHING else run / "checkpoints" / f"step-{step:06d}"), ()


def names_of_model(state: Mapping[str, Any], model: Mapping[str, Tensor]) -> set[str]:
    return set(state[SHARDED]["model"]) if SHARDED in state else set(model)


def room_for(key: str, facts: Any, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Empty memory for a statistic: sharded as its parameter, or whole where it has another shape (a step count)."""
    name = key.partition("/")[2]
    if name not in parameters:
        raise UsageError(f"the checkpoint's optimiser knows {name!r}, the model does not", hint="the same model")
    if tuple(facts.size) == tuple(parameters[name].shape):
        return torch.empty_like(parameters[name].detach(), dtype=facts.properties.dtype)
    return torch.empty(facts.size, dtype=facts.properties.dtype)


def check_same_model(known: Mapping[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    before = {n: (f.properties.dtype, torch.Size(f.size)) for n, f in known.items() if n not in optimizer}
    now = {name: (tensor.dtype, tensor.shape) for name, tensor in model.items()}
    if names := differing_keys(before, now):
        raise UsageError("the checkpoint is of another model", received=f"differing tensors: {', '.join(names[:3])}")
