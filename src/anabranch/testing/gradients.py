# SPDX-License-Identifier: Apache-2.0
"""Gradients against difference quotients in fp64, of a whole method or of its terms."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.testing.case import Case, NotApplicable, floating
from anabranch.testing.checks import in_precision, is_single
from anabranch.testing.subject import Inputs
from anabranch.testing.trees import leaves

STEPS = ((1e-6, 1e-3), (1e-3, 1e-2), (3e-3, 1e-2))
"""Of difference quotients, and how near they have to be; the longer ones where a model rounds to fp32 on the way."""
MOST_TENSORS = 12
"""Tensors that a gradient is checked by one at a time; of more, about as many of them evenly spread."""


def gradcheck(case: Case) -> None:
    if case.subject.terms is not None:
        for name, (term, tensors) in case.subject.terms(torch.Generator().manual_seed(case.seed)).items():
            right(name, term, tuple(tensor.detach().double().requires_grad_() for tensor in tensors))
        return
    given = case.make()
    for tensor in by_gradient(given).values():
        tensor.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are taken out of tensors with a gradient
        output = case.run(given)
    if not carried(output):
        raise NotApplicable("nothing that it returns carries a gradient")
    paths, given = set(by_gradient(given)), in_precision(case.make(), torch.float64)
    wide = {path: leaf for path, leaf in floating(given) if path in paths}
    right("it", lambda *_: carried(run_again(case, given)), tuple(leaf.requires_grad_() for leaf in wide.values()))


def by_gradient(given: Inputs) -> dict[str, Tensor]:
    """Tensors in float32 and parameters, not the buffers of modules; sums that a method takes in fp64 are data."""
    buffers = {id(value) for part in given.values() if isinstance(part, nn.Module) for value in part.buffers()}
    return {
        path: leaf for path, leaf in floating(given)
        if isinstance(leaf, Tensor) and is_single(leaf) and id(leaf) not in buffers
    }  # fmt: skip


def run_again(case: Case, given: Inputs) -> Any:
    """With generators at their beginning, as every evaluation of a derivative needs them."""
    for value in given.values():
        if isinstance(value, torch.Generator):
            value.manual_seed(value.initial_seed())
    return case.run(given)


def carried(output: Any) -> tuple[Tensor, ...]:
    tensors = [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)]
    return tuple(tensor for tensor in tensors if tensor.requires_grad and not tensor.is_leaf)


def right(name: str, term: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    """Along a drawn direction in each tensor, and in all together: the derivative against a difference quotient.

    torch's own gradcheck looks at every element once something differs, which takes minutes for a model.
    """
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in tensors]

    def value() -> Tensor:
        output = term(*tensors)
        weights = torch.Generator().manual_seed(1)
        parts = output if isinstance(output, tuple) else (output,)
        return sum((part.double() * torch.randn(part.shape, generator=weights)).sum() for part in parts)

    slopes = torch.autograd.grad(value(), tensors, allow_unused=True)
    along = [0.0 if g is None else float((g * d).sum()) for g, d in zip(slopes, directions, strict=True)]
    step = max(1, len(tensors) // MOST_TENSORS)
    for chosen in [range(len(tensors)), *([i] for i in range(0, len(tensors), step))]:
        expected = sum(along[i] for i in chosen)
        for eps, tolerance in STEPS:
            found = quotient(value, tensors, directions, chosen, eps)
            scale = max(abs(found), abs(expected), 1e-3 * max(map(abs, along)), 1e-6)
            if abs(found - expected) <= tolerance * scale:
                break
        else:
            raise AssertionError(f"the gradient of {name} is {expected:.6g} and not {found:.6g}")


def quotient(value: Callable[[], Tensor], tensors: Any, directions: Any, chosen: Any, eps: float) -> float:
    """(f(x + eps v) - f(x - eps v)) / 2 eps, by the chosen tensors."""
    values = []
    for sign in (1, -1):
        kept = {i: tensors[i].detach().clone() for i in chosen}
        with torch.no_grad():
            for i in chosen:
                tensors[i].add_(sign * eps * directions[i])
        values.append(float(value().detach()))
        with torch.no_grad():
            for i, before in kept.items():
                tensors[i].copy_(before)
    return (values[0] - values[1]) / (2 * eps)
