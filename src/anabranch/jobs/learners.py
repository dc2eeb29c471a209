# SPDX-License-Identifier: Apache-2.0
"""How a model learns: the modules of `specialize` that train a plain model, found by name.

Every learner offers

    FAMILY                                  the bridge of its models, see anabranch.models.bridge
    LEARNING_RATE                           the peak that is taken where none is set
    objective(model, *, seed)               a module; its forward turns a batch into {"loss": ()}, `.model` is the model
    stream(images, model, indices, *, seed, augment=False, **ids)    the batches of all steps
"""

from importlib import import_module
from types import ModuleType

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.bridge import bridge

LEARNERS = ("mae", "simsiam", "byol")
LEARNING_RATE = 4e-3
"""Of a learner that names none."""


def learner(name: str) -> ModuleType:
    if name not in LEARNERS:
        raise UsageError(f"there is no learner {name!r}", hint=did_you_mean(name, LEARNERS))
    return import_module(f"anabranch.specialize.{name}")


def family_of(name: str) -> ModuleType:
    """The bridge to the models of a learner."""
    return bridge(learner(name).FAMILY)


def learning_rate(name: str, given: float | None) -> float:
    """The peak that was asked for, else the learner's own."""
    return float(getattr(learner(name), "LEARNING_RATE", LEARNING_RATE)) if given is None else given
