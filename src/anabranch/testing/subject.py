# SPDX-License-Identifier: Apache-2.0
"""How a method is exercised, so that `check_method` can hold it to the contract.

    def subject() -> Subject:
        return Subject(
            inputs=lambda g: {"features": torch.randn(12, 4, generator=g), "num_clusters": 3, "generator": g},
            call=my_method.fit,
            samples=along(12, {"features": 0}, {"labels": 0}),
        )

Two functions are all that most methods need: `inputs` draws what the method takes, `call` runs it. The other fields say
what cannot be guessed, such as how rows are padded or what strength 0 is called.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anabranch.testing.trees import reordered

Inputs = dict[str, Any]
Terms = Mapping[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]


@dataclass(frozen=True, kw_only=True)
class Reordering:
    """A change of order that a method has to follow: of samples, or of experts."""

    size: int
    """How many there are."""
    inputs: Callable[[Inputs, list[int]], Inputs]
    """The same inputs in another order; what was at order[i] is now at i."""
    output: Callable[[Any, list[int]], Any]
    """What the plain output has to become; the output itself where order does not matter."""
    compared: Callable[[Any], Any] = lambda output: output
    """What of the output is compared: leaves out numbers that are given by place, such as those of groups."""


def along(size: int, inputs: Mapping[str, int], output: Mapping[str, int] | None = None) -> Reordering:
    """A reordering of tensors, arrays and lists, found by patterns of their paths, along a dimension each.

    along(12, {"features": 0, "labels": 0})                  the output does not depend on the order
    along(8, {"stats.sums.*": 3}, {"": 1})                   the output, a tensor, is reordered along dimension 1
    """
    moved = output or {}
    return Reordering(
        size=size,
        inputs=lambda given, order: reordered(given, inputs, order),
        output=lambda result, order: reordered(result, moved, order),
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What `check_method` needs to know about a method. A field left out means that the method has no such thing."""

    inputs: Callable[[torch.Generator], Inputs]
    """Draws the arguments of `call` by name, small ones; the same generator state gives the same. If the method draws
    too, hand it a generator among them. A module (an objective, a model) is an argument like any other; what is called
    `objective` is trained by its `output["loss"]`."""
    call: Callable[..., Any]
    """The method itself, or a few lines around it; called as `call(**inputs)`. What it returns is compared: tensors,
    arrays, numbers, texts, and whatever dataclasses, tuples, dictionaries and modules hold of them."""

    changes: tuple[str, ...] = ()
    """Arguments that it may change in place, such as the model that it prunes. They count as output."""
    touches: Callable[[Inputs, Any], Collection[str]] | None = None
    """(inputs, output) to the names, as patterns, of all tensors that change by the call itself and, of an objective,
    by one optimiser step on its `output["loss"]`. Names start with the argument, as objective.gate.weight."""
    samples: Reordering | None = None
    """Another order of the samples (rows, images, documents), see `along`."""
    experts: Reordering | None = None
    """Another order of the experts."""
    pad: Callable[[Inputs], Inputs] | None = None
    """The same inputs with masked rows added, filled with anything but zeros."""
    unpad: Callable[[Any], Any] = lambda output: output
    """Takes from the output of padded inputs what belongs to padding."""
    off: Callable[[Inputs], tuple[Any, Any]] | None = None
    """(what the method gives at strength 0, what the plain thing gives), which have to be the same bit by bit."""
    terms: Callable[[torch.Generator], Terms] | None = None
    """Differentiable terms by name, each with the tensors to differentiate it by. Left out: `call` as a whole; give
    them where it stops gradients on purpose, or trains."""
    reload: Callable[[Any, Path], Any] | None = None
    """Saves the output to an empty folder with the method's own `save` and loads it; not needed for modules."""
    configs: tuple[Any, ...] = ()
    """Instances of a Config that is neither among the inputs nor made from defaults alone."""
    tolerance: float = 1e-5
    """Of sums in another order or shape, relative to the largest value."""
    scale: float = 0.0
    """Size of numbers of its kind, where the largest value may happen to be near 0: a cosine has 1."""
    half: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.bfloat16: 2e-2, torch.float16: 5e-3},
    )
    """Precisions that it is run in, and how far it may be from float32 on the same rounded inputs; its own modules keep
    float32 parameters and run under autocast."""
