# SPDX-License-Identifier: Apache-2.0
"""One method and its subject under check: fresh inputs, a run of the method, and global generators kept apart."""

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.testing.subject import Inputs, Subject
from anabranch.testing.trees import Snapshot, difference, leaves, snapshot


class NotApplicable(Exception):
    """The method takes or gives nothing of the kind."""


@dataclass(frozen=True)
class Case:
    module: ModuleType
    subject: Subject
    seed: int
    leaves: int = 8
    """Floating leaves of one argument that NaN and infinity are put into; of more, about as many evenly spread."""
    unread: set[str] = field(default_factory=set)
    """Leaves that were found to be read by nothing, whatever is in them."""

    def make(self, shift: int = 0) -> Inputs:
        """Fresh inputs; models are built under global generators that are put back afterwards."""
        with alone():
            torch.manual_seed(self.seed + shift)
            return self.subject.inputs(torch.Generator().manual_seed(self.seed + shift))

    def run(self, given: Inputs) -> Any:
        """All that comes out: what is returned and what is changed."""
        result = self.subject.call(**given)
        return {"": result, **{name: given[name] for name in self.subject.changes}}

    def differs(self, received: Any, expected: Any, tolerance: float | None = None) -> str | None:
        """Within the subject's tolerance, or the one that is given."""
        subject = self.subject
        return difference(received, expected, subject.tolerance if tolerance is None else tolerance, subject.scale)

    def fresh(self) -> Any:
        return self.run(self.make())


@contextmanager
def alone() -> Iterator[None]:
    """Global generators as they were, whatever happens inside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def fixed(given: Inputs, changes: Collection[str]) -> Snapshot:
    """What must not change: everything but generators and what was said to."""
    kept = {name: value for name, value in given.items() if name not in changes and not is_generator(value)}
    return snapshot(kept)


def is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, np.random.Generator))


def is_floating(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() and leaf.numel() > 0
    return isinstance(leaf, float) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f" and leaf.size > 0)


def floating(given: Inputs) -> list[tuple[str, Any]]:
    return [(path, leaf) for path, leaf in leaves(given) if is_floating(leaf)]
