# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: folders that are either complete and unaltered or not loaded.

A checkpoint is `run/checkpoints/step-000123/` with model.safetensors (parameters and buffers), optimizer.safetensors
(one tensor per parameter and statistic, named `exp_avg/PARAMETER`), state.json and manifest.json. Loading walks back
from the newest to the first that verifies and tells which ones it passed over. No pickle, in or out.

Sharded training writes the same tensors as one file a process (sharded_checkpoint.py); one process reads those as well.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.swap import DISK_ERRORS, remove_folder
from anabranch.train.publish import publish_folder, read_json, replace_folder, verify_folder

__all__ = ["Checkpoint", "Loaded", "Skipped", "load_checkpoint", "publish_folder", "require_space", "save_checkpoint"]

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{6,12})")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SHARDED = "sharded"
"""Entry of state.json that names the tensors of a checkpoint of shards."""
HEADROOM_BYTES = 2**16
"""Headers, state.json and manifest.json."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    step: int
    """Steps that are finished."""
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    config: Mapping[str, Any]
    world_size: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the caller needs to go on, as plain JSON values."""


class Skipped(NamedTuple):
    path: Path
    reason: str


class Loaded(NamedTuple):
    checkpoint: Checkpoint
    path: Path
    skipped: tuple[Skipped, ...]


def save_checkpoint(run: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Publish `checkpoint`, then delete all but the `keep` newest up to it. A failure leaves the earlier ones alone."""
    check_keep(keep)
    model, optimizer = storable(checkpoint.model), storable(checkpoint.optimizer)

    def write(folder: Path) -> None:
        save_file(model, folder / MODEL)
        save_file(optimizer, folder / OPTIMIZER)
        write_state(folder, checkpoint)

    target = run / "checkpoints" / f"step-{checkpoint.step:06d}"
    bytes_needed = sum(tensor.nbytes for tensor in [*model.values(), *optimizer.values()]) + HEADROOM_BYTES
    replace_folder(write, target, bytes_needed=bytes_needed)
    prune(run, checkpoint.step, keep)
    return target


def check_keep(keep: int) -> None:
    if keep < 2:
        raise ValueError(f"keep: expected at least 2, so that one may rot, received {keep}")


def prune(run: Path, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest up to the step that was just saved."""
    # Later ones can only be damaged leftovers that loading walked past: they must not push out good ones.
    for step in [step for step in checkpoint_steps(run) if step <= newest][:-keep]:
        with suppress(OSError):  # the save succeeded; what could not be deleted is tried again at the next
            remove_folder(run / "checkpoints" / f"step-{step:06d}")


def write_state(folder: Path, checkpoint: Checkpoint, **more: Any) -> None:
    (folder / STATE).write_text(json.dumps(_state(checkpoint) | more, indent=1))


def load_checkpoint(run: Path) -> Loaded | None:
    """The newest checkpoint that verifies and those passed over on the way; None where there has never been one."""
    found = walk_back(run, _read)
    return None if found is None else Loaded(*found)


Content = TypeVar("Content")


def walk_back(run: Path, read: Callable[[Path, int], Content]) -> tuple[Content, Path, tuple[Skipped, ...]] | None:
    """What `read` makes of the newest folder that it does not refuse."""
    skipped: list[Skipped] = []
    for step in reversed(checkpoint_steps(run)):
        path = run / "checkpoints" / f"step-{step:06d}"
        try:
            return read(path, step), path, tuple(skipped)
        except AnabranchError as error:
            skipped.append(Skipped(path, error.what))
        except DISK_ERRORS as error:
            skipped.append(Skipped(path, str(error)))
    if skipped:
        raise AnabranchError(
            f"no checkpoint in {run / 'checkpoints'} can be loaded",
            expected="at least one that is complete and unaltered",
            received="; ".join(f"{path.name}: {reason}" for path, reason in skipped),
            hint="start again in another folder, or bring one back from a backup",
        )
    return None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoint folders, oldest first, whatever their state."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    matches = [STEP_FOLDER.fullmatch(entry.name) for entry in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse to start where two checkpoints do not fit: the new one is complete before an old one goes."""
    free = shutil.disk_usage(folder).free
    if free < 2 * nbytes:
        raise AnabranchError(
            f"too little space for checkpoints in {folder}",
            expected=f"at least {2 * nbytes} bytes free (twice a checkpoint)",
            received=f"{free} bytes free",
            hint="make room or choose another --out",
        )


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": checkpoint.step,
        "config": dict(checkpoint.config),
        "config_hash": config_hash(checkpoint.config),
        "world_size": checkpoint.world_size,
        "versions": {package: version(package) for package in ("anabranch", "torch", "accelerate", "safetensors")},
        "extra": dict(checkpoint.extra),
    }


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies of tensors that share memory (tied weights), which the file format has no words for."""
    storages: set[int] = set()
    stored = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise AnabranchError(
                f"the state {name!r} cannot be saved", expected="a tensor", received=type(value).__name__
            )
        tensor = value.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return stored


def _read(path: Path, step: int) -> Checkpoint:
    state = verified(path, step)
    if SHARDED in state:
        model, optimizer = read_shards(path, state[SHARDED])
    else:
        model, optimizer = load_file(path / MODEL), load_file(path / OPTIMIZER)
    return of_state(state, model, optimizer)


def of_state(state: Mapping[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Checkpoint:
    return Checkpoint(
        step=state["step"],
        model=model,
        optimizer=optimizer,
        config=state["config"],
        world_size=state["world_size"],
        extra=state["extra"],
    )


def verified(path: Path, step: int) -> dict[str, Any]:
    """state.json of a checkpoint whose every file is as it was written, and which has no other tensors beside them."""
    files = verify_folder(path).keys()
    if missing := {STATE} - files:
        raise AnabranchError(f"{', '.join(sorted(missing))}: not in the manifest")
    state = read_json(path / STATE)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise AnabranchError(f"{STATE}: format {FORMAT} expected; written by another version of anabranch")
    if state.get("step") != step:
        raise AnabranchError(f"{STATE}: says step {state.get('step')}, the folder says {step}")
    kinds = {"config": dict, "world_size": int, "extra": dict}
    if odd := [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]:
        raise AnabranchError(f"{STATE}: no usable {', '.join(odd)}")
    if SHARDED not in state and (missing := {MODEL, OPTIMIZER} - files):
        raise AnabranchError(f"{', '.join(sorted(missing))}: not in the manifest")
    if strangers := {file.name for file in path.glob("*.safetensors")} - files:
        raise AnabranchError(f"{', '.join(sorted(strangers))}: not in the manifest")
    return state


def read_shards(path: Path, names: Mapping[str, list[str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model and optimiser as whole tensors, in one process."""
    import torch.distributed.checkpoint  # two seconds, for these alone

    dcp: Any = torch.distributed.checkpoint
    reader = dcp.HuggingFaceStorageReader(str(path))
    known: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    check_complete(known, [*names["model"], *names["optimizer"]])
    whole = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
        dcp.load(dict(whole), storage_reader=reader, no_dist=True)
    model, optimizer = ({name: whole[name] for name in names[kind]} for kind in ("model", "optimizer"))
    return model, optimizer


def check_complete(known: Mapping[str, Any], names: list[str]) -> None:
    """Every tensor is there, and its parts cover it: what is not read would be left as it was."""
    if missing := sorted(set(names) - known.keys()):
        raise AnabranchError(f"{missing[0]}: in none of the shards")
    for name, facts in known.items():
        held = sum(chunk.sizes.numel() for chunk in facts.chunks)
        if held != facts.size.numel():
            raise AnabranchError(f"{name}: the shards hold {held} of {facts.size.numel()} numbers")
