# SPDX-License-Identifier: Apache-2.0
"""BYOL: learn features by predicting what a slowly following copy of the network sees in another view.

Paper     : Grill et al. 2020, "Bootstrap Your Own Latent" (arXiv 2006.07733).
Equation  : L = (2 - 2 cos(p1, z2')) + (2 - 2 cos(p2, z1')) = 4 (1 + mean over pairs of D(p_a, sg z_b'));
            xi <- tau xi + (1 - tau) theta after every step,  tau_k = 1 - (1 - tau) (cos(pi k / K) + 1) / 2.
Shapes    : B images, C channels, S pixels a side, k finished steps of K (total_steps).
Differs   : 256 hidden units, not 4096, for small images. The target follows at the start of the next step, from the
            step's number, so that the loop needs no hook; the last update of a run is thus never made, and nobody
            uses the target after it. `total_steps` None keeps tau. Views are those of SimSiam, the same for both nets.
            Of several processes each normalises by its own rows, so that their number changes what is learned.
Check     : target by slow loops, still in evaluation, resume bit for bit (tests/specialize/test_byol.py).
Exempt    : off (nothing is added that could be switched off)
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.data.streams import derived_seed
from anabranch.data.views import NUM_LARGE
from anabranch.models.resnet import feature_size, features
from anabranch.specialize.simsiam import (
    FAMILY,
    LEARNING_RATE,
    OPTIMIZER,
    WEIGHT_DECAY,
    cross_view,
    predictor,
    spread,
    stream,
    views_in,
)
from anabranch.train.seeding import seeded

__all__ = [
    "FAMILY",
    "LEARNING_RATE",
    "OPTIMIZER",
    "WEIGHT_DECAY",
    "Bootstrap",
    "Config",
    "momentum",
    "objective",
    "stream",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    projector_size: int = 256
    hidden_size: int = 256
    """Of the projector and of the predictor."""
    tau: float = 0.996
    """How much of itself the target keeps in the first step; 1 in the last."""
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("projector_size", "hidden_size", "total_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, received {value}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau: expected 0..1, received {self.tau}")


def momentum(step: int, config: Config) -> float:
    """tau_k = 1 - (1 - tau) (cos(pi k / K) + 1) / 2."""
    if config.total_steps is None:
        return config.tau
    return 1 - (1 - config.tau) * (math.cos(math.pi * min(step / config.total_steps, 1)) + 1) / 2


class Bootstrap(nn.Module):
    """Objective: batch of `TwoViews` -> {"loss": (), "spread": ()}; trains `model` in place.

    A forward in training mode is a step: it moves the target. Evaluation leaves the target alone.
    """

    def __init__(self, model: nn.Module, config: Config, *, seed: int):
        super().__init__()
        self.model, self.config = model, config
        size, hidden_size = config.projector_size, config.hidden_size
        with seeded(derived_seed("bootstrap heads", seed), torch.device("cpu")):
            # the paper's projector has the form of SimSiam's predictor: no norm at its end
            self.projector = predictor(feature_size(model), hidden_size, size)
            self.predictor = predictor(size, hidden_size, size)
        # the target normalises by batch statistics as the online network does; its running ones are its own
        self.target_model = copy.deepcopy(model).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def follows(self) -> list[str]:
        """Names, as patterns, of tensors that change without a gradient."""
        return ["target_*"]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        views = views_in(batch, self.training)
        if self.training:
            self.follow(int(batch["step"][0]))
        predictions = [self.predictor(self.projector(features(self.model, view))) for view in views]
        with torch.no_grad():
            targets = [self.target_projector(features(self.target_model, view)) for view in views[:NUM_LARGE]]
        return {"loss": 4 * (1 + cross_view(predictions, targets)), "spread": spread(torch.cat(targets))}

    @torch.no_grad()
    def follow(self, finished_steps: int) -> None:
        """xi <- xi + (1 - tau) (theta - xi), the update that belongs to the step just finished."""
        if finished_steps == 0:
            return
        weight = 1 - momentum(finished_steps - 1, self.config)
        for online, target in ((self.model, self.target_model), (self.projector, self.target_projector)):
            for theta, xi in zip(online.parameters(), target.parameters(), strict=True):
                xi.lerp_(theta, weight)


def objective(model: nn.Module, *, seed: int, config: Config | None = None) -> nn.Module:
    """What train/loop minimises; the new heads are a function of `seed` alone."""
    return Bootstrap(model, config or Config(), seed=seed)
