# SPDX-License-Identifier: Apache-2.0
"""How a model learns: the modules of `specialize` that train a plain model, found by name.

Every learner offers

    FAMILY                                  the bridge of its models, see anabranch.models.bridge
    OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY  with what it is trained, and the values that are taken where none is set
    objective(model, *, seed)               a module; its forward turns a batch into {"loss": ()}, `.model` is the model
    stream(images, model, indices, *, seed, augment=False, **ids)    the batches of all steps
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.bridge import bridge

LEARNERS = ("mae", "simsiam", "byol")


def learner(name: str) -> ModuleType:
    if name not in LEARNERS:
        raise UsageError(f"there is no learner {name!r}", hint=did_you_mean(name, LEARNERS))
    return import_module(f"anabranch.specialize.{name}")


def family_of(name: str) -> ModuleType:
    """The bridge to the models of a learner."""
    return bridge(learner(name).FAMILY)


def training(name: str, rate: float | None = None, weight_decay: float | None = None) -> dict[str, Any]:
    """Arguments of TrainConfig: what was asked for, else the learner's own."""
    module = learner(name)
    return {
        "optimizer": module.OPTIMIZER,
        "learning_rate": module.LEARNING_RATE if rate is None else rate,
        "weight_decay": module.WEIGHT_DECAY if weight_decay is None else weight_decay,
    }
