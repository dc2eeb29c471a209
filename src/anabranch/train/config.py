# SPDX-License-Identifier: Apache-2.0
"""What a training run is asked to do. Budgets count optimiser steps, never time."""

from dataclasses import dataclass
from typing import Literal

from anabranch.train.trackers import Tracker, check_tracker


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    batch_size: int
    """Rows of one optimiser step, over all processes together."""
    learning_rate: float
    warmup_steps: int = 0
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.05
    """Not applied to biases, norms and other one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of adamw; sgd has the first as its momentum."""
    max_grad_norm: float | None = None
    seed: int = 0
    save_every: int = 500
    """Steps between checkpoints; the last step and a stop are always saved."""
    log_every: int = 50
    deterministic: bool = True
    """Refuse operations that have no deterministic form, so that a resumed run is bitwise the uninterrupted one."""
    mixed_precision: Literal["no", "bf16"] = "no"
    tracker: Tracker = "none"
    """Who hears the numbers of metrics.jsonl as well."""
    sharding: Literal["none", "full"] = "none"
    """full: of several processes each keeps a part of the parameters, gradients and moments, not a copy of all."""

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "warmup_steps", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, received {getattr(self, name)}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: expected at most steps ({self.steps}), received {self.warmup_steps}")
        if self.min_learning_rate > self.learning_rate:
            at_most = f"at most learning_rate ({self.learning_rate})"
            raise ValueError(f"min_learning_rate: expected {at_most}, received {self.min_learning_rate}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), received {self.betas}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a number > 0 or none, received {self.max_grad_norm}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: expected adamw or sgd, received {self.optimizer}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision: expected no or bf16, received {self.mixed_precision}")
        if self.sharding not in ("none", "full"):
            raise ValueError(f"sharding: expected none or full, received {self.sharding}")
