# SPDX-License-Identifier: Apache-2.0
"""The lines of metrics.jsonl, told to a tracker as well: tensorboard, trackio or wandb, through accelerate's own.

tensorboard   RUN/tensorboard                       tensorboard --logdir RUN
trackio       its own folder (TRACKIO_DIR)          trackio show --project anabranch
wandb         RUN/wandb, offline; with WANDB_MODE=online in the environment it is sent as it is written

Nothing leaves the machine unless the tracker was told so in its own environment. metrics.jsonl stays the record: a
tracker that fails is let go with a warning, and the training goes on.
"""

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

from anabranch.errors import AnabranchError, UsageError, did_you_mean

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
"""Any of them will do."""
PROJECT = "anabranch"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """Settings of a command that trains."""

    tracker: Tracker = "none"
    """Also tell the numbers of metrics.jsonl to tensorboard, trackio or wandb; the last two stay offline."""

    def __post_init__(self) -> None:
        check_tracker(self.tracker)


def check_tracker(name: str) -> None:
    """
    Raises:
        UsageError: no such tracker, or its package is not installed.
    """
    if name not in get_args(Tracker):
        raise UsageError(f"there is no tracker {name!r}", hint=did_you_mean(name, get_args(Tracker)))
    packages = PACKAGES.get(name, ())
    if packages and not any(find_spec(package) for package in packages):
        raise UsageError(
            f"the tracker {name} is not installed", expected=" or ".join(packages), received="none of them",
            hint=f"pip install {packages[0]}",
        )  # fmt: skip


def open_tracker(name: Tracker, run: Path, *, after_step: int = 0) -> Any:
    """A started tracker of accelerate for this run, or None; called in the first process alone."""
    if name == "none":
        return None
    check_tracker(name)
    from accelerate import tracking

    label = run.name if run.name != "training" else run.parent.name
    if name == "tensorboard":  # steps beyond the one that is resumed from are told again
        tracker = tracking.TensorBoardTracker("tensorboard", run, purge_step=after_step + 1 if after_step else None)
    elif name == "trackio":
        tracker = tracking.TrackioTracker(PROJECT, name=label, **of_trackio())
    else:
        tracker = tracking.WandBTracker(PROJECT, name=label, **of_wandb(run, resumed=after_step > 0))
    try:
        tracker.start()
    except Exception as error:
        raise AnabranchError(
            f"the tracker {name} could not be started", received=f"{type(error).__name__}: {str(error)[:300]}",
            hint="tracker=none trains without it",
        ) from error  # fmt: skip
    return tracker


def of_trackio() -> dict[str, Any]:
    """What it is told, as far as the installed version knows it."""
    import trackio

    wanted = {"resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    known = signature(trackio.init).parameters
    return {name: value for name, value in wanted.items() if name in known}


def of_wandb(run: Path, *, resumed: bool) -> dict[str, Any]:
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    identity = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
    quiet = wandb.Settings(silent=True, console="off")
    more = {"resume": "allow"} if resumed and mode == "online" else {}
    return {"id": identity, "dir": str(run), "mode": mode, "settings": quiet, **more}
