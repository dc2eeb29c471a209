# SPDX-License-Identifier: Apache-2.0
"""The contract that every method of the library passes, and yours can.

    check_method("measure/rank", subject())          # a key of `anabranch list`
    check_method(my_package.my_method, subject())    # or your own module

It raises AssertionError with a sentence for everything that does not hold. Which checks apply is seen from what the
method takes and gives, never said by its author:

    config        a Config survives JSON, and refuses a name that it does not know
    gradcheck     gradients are right in fp64, of every term that carries one
    nan, inf      one such number in a floating input or parameter is refused, before anything was changed, or can be
                  seen in the output; a finite answer is only right where the whole input is never read
    dtype         in bf16 and fp16 within a stated distance of float32 on the same rounded inputs, or refused
    padding       masked rows change nothing                           (applies if something it takes is a mask)
    samples       their order changes nothing, or reorders the output            (it takes several of something)
    experts       their order changes nothing, or reorders the output                   (it takes experts)
    determinism   twice the same inputs and generator state, twice the same bits
    rng           the global generators of torch, numpy and python are neither used nor moved
    inputs        nothing is changed in place that was not said to be
    save          its state in a safetensors file, read into a fresh twin, gives the same digest and output
    touch         the tensors that it names are exactly those that change   (it changes tensors, or learns parameters)
    off           strength 0 is the plain thing, bit by bit          (it changes or learns a model, or has a strength)

A method that cannot give what applies to it says so in its card, with the reason:

    Exempt    : samples (their order is what is measured); padding (masked upstream)

What is neither checked nor exempt is a failure, and so is an exemption that is not needed: at seed 0, as another seed
may not draw the case. A refusal (an error of ours, or a ValueError) counts as not holding, any other error
as a failure.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from anabranch import registry
from anabranch.errors import AnabranchError, UsageError
from anabranch.registry import Card
from anabranch.testing import checks, gradients, poison
from anabranch.testing.case import Case, NotApplicable, alone
from anabranch.testing.subject import Subject

CHECKS: dict[str, Callable[[Case], None]] = {
    "config": checks.config, "gradcheck": gradients.gradcheck, "nan": poison.nan, "inf": poison.inf,
    "dtype": checks.dtype, "padding": checks.padding, "samples": checks.samples, "experts": checks.experts,
    "determinism": checks.determinism, "rng": checks.rng, "inputs": checks.inputs, "save": checks.save,
    "touch": checks.touch, "off": checks.off,
}  # fmt: skip
EVERYTHING = "everything"
THOROUGH = 8
"""Tensors of a model from which on a NaN was put into enough of them to say that an exemption is not needed."""
PASSED, EXEMPT, NOT_APPLICABLE, FAILED = "passed", "exempt", "not applicable", "failed"


@dataclass(frozen=True)
class Outcome:
    state: str
    """passed, exempt, not applicable or failed."""
    why: str = ""


def check_method(
    method: str | ModuleType, subject: Subject | None, *, seed: int = 0, leaves: int = THOROUGH
) -> dict[str, Outcome]:
    """Hold a method to the contract.

    method      a key of the registry, or the module of a method, whose docstring is its card
    subject     how to exercise it; None for one whose card exempts it from everything
    leaves      of every argument, such as a model, how many of its tensors a NaN is put into

    Raises:
        AssertionError: something does not hold; every such thing is a line of its message.
    """
    outcomes = examine(method, subject, seed=seed, leaves=leaves)
    failures = [f"{name}: {outcome.why}" for name, outcome in outcomes.items() if outcome.state == FAILED]
    key = method if isinstance(method, str) else method.__name__
    assert not failures, "\n".join([f"{key} breaks its contract", *failures])
    return outcomes


def examine(
    method: str | ModuleType, subject: Subject | None, *, seed: int = 0, leaves: int = THOROUGH
) -> dict[str, Outcome]:
    """The outcome of every check, failures included."""
    module = registry.get(method) if isinstance(method, str) else method
    card = card_of(module, method if isinstance(method, str) else module.__name__)
    exempt = card.exempt
    if unknown := sorted(set(exempt) - set(CHECKS) - {EVERYTHING}):
        return dict.fromkeys(CHECKS, Outcome(FAILED, f"the card exempts it from {', '.join(unknown)}: no such check"))
    if EVERYTHING in exempt:
        return dict.fromkeys(CHECKS, Outcome(EXEMPT, exempt[EVERYTHING]))
    if subject is None:
        return dict.fromkeys(CHECKS, Outcome(FAILED, "nothing says how to exercise it: there is no subject"))
    case = Case(module, subject, seed, leaves)
    return {name: outcome(check, case, exempt.get(name)) for name, check in CHECKS.items()}


def card_of(module: ModuleType, key: str) -> Card:
    card = registry.parse_card(key, inspect.getdoc(module) or "")
    if card is None:
        raise UsageError(f"{key} is no method", expected="a module docstring with a `Paper` line", received="none")
    return card


def outcome(check: Callable[[Case], None], case: Case, exemption: str | None) -> Outcome:
    """An exemption is tried as well: one that is not needed hides what the method can do."""
    try:
        with alone():
            check(case)
    except NotApplicable as reason:
        if exemption is None:
            return Outcome(NOT_APPLICABLE, str(reason))
        return Outcome(FAILED, f"the card exempts it from what does not apply: {reason}")
    except Exception as error:
        if exemption is not None and isinstance(error, (AssertionError, AnabranchError, ValueError)):
            return Outcome(EXEMPT, exemption)
        said = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome(FAILED, f"{said}{error}")
    if exemption is None:
        return Outcome(PASSED)
    if case.seed or (check in (poison.nan, poison.inf) and case.leaves < THOROUGH):
        return Outcome(EXEMPT, exemption)  # where it does not hold may not have been tried, or drawn
    return Outcome(FAILED, "the card exempts it, but it holds")
