# SPDX-License-Identifier: Apache-2.0
"""Numbers that are none, put into every floating input and parameter: refused or seen, never passed over in silence."""

from typing import Any

import numpy as np
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.testing.case import Case, NotApplicable, floating, is_generator
from anabranch.testing.subject import Inputs
from anabranch.testing.trees import InPlace, Snapshot, as_array, difference, leaves, replaced, snapshot

REFUSED = (AnabranchError, ValueError, ArithmeticError, RuntimeError, IndexError)
"""A refusal in the user's words is better; no answer at all is what counts here."""
PLACES = 4
"""Places of a leaf, evenly spread, that are tried until one of them is read by the method."""
INSTEAD = (1e3, -1e3, 0.37)
"""Other numbers in the same place: if one of them changes the output, the place is read."""


def nan(case: Case) -> None:
    poison(case, float("nan"), "NaN")


def inf(case: Case) -> None:
    poison(case, float("inf"), "infinity")


def poison(case: Case, number: float, name: str) -> None:
    paths = tried(case.make(), case.leaves)
    if not paths:
        raise NotApplicable("it takes no floating number")
    clean = snapshot(case.fresh())
    for path in paths:
        if path in case.unread:
            continue
        for place in range(PLACES):
            if (answer := answer_to(case, path, place, number, name, clean)) is None:
                break
            differs = case.differs(without(answer, path), without(clean, path))
            assert differs is None, f"{name} in {path} gives a finite answer, and another one than without: {differs}"
            assert not is_read(case, path, place, clean), f"{name} in {path} is passed over in silence"
            if place == 0 and not is_read(case, path, None, clean):
                case.unread.add(path)
                break


def without(values: Snapshot, path: str) -> Snapshot:
    """What a method may change comes back as output, and with it the number that was put there."""
    return Snapshot({at: leaf for at, leaf in values.items() if at != path})


def tried(given: Inputs, most: int) -> list[str]:
    found = []
    for name, value in given.items():
        paths = [path for path, _ in floating({name: value})]
        step = max(1, -(-len(paths) // most))
        found += [path for i, path in enumerate(paths) if i % step == 0 or i == len(paths) - 1]
    return found


def answer_to(case: Case, path: str, place: int, number: float, name: str, clean: Snapshot) -> Snapshot | None:
    """The output; None where the number was refused, with nothing changed, or can be seen."""
    try:
        given = put(case.make(), path, number, place)
    except REFUSED:
        return None  # a dataclass that checks what it is made of
    before = held(given)
    try:
        with np.errstate(all="ignore"):
            output = case.run(given)
    except REFUSED:
        changed = difference(held(given), before)
        assert changed is None, f"{name} in {path} is refused after something was changed: {changed}"
        return None
    return None if visible(output, clean, path) else snapshot(output)


def held(given: Inputs) -> Snapshot:
    return snapshot({name: value for name, value in given.items() if not is_generator(value)})


def visible(output: Any, clean: Snapshot, path: str) -> bool:
    """More odd numbers than without; the poisoned tensor itself, where it is part of the output, has one anyway."""
    return any(odd(leaf) > odd(clean.get(at)) * (at in clean) + (at == path) for at, leaf in leaves(output))


def odd(leaf: Any) -> int:
    """NaN, infinity, or nothing in place of a number."""
    array = as_array(leaf)
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        return int((~np.isfinite(array)).sum())
    return int(leaf is None)


def is_read(case: Case, path: str, place: int | None, clean: Snapshot) -> bool:
    """Does another number in this place, or in all of them, change the output?"""
    for number in INSTEAD:
        try:
            with np.errstate(all="ignore"):
                output = case.run(put(case.make(), path, number, place))
        except REFUSED:
            return True
        if case.differs(without(snapshot(output), path), without(clean, path)) is not None:
            return True
    return False


def put(given: Inputs, path: str, number: float, place: int | None) -> Inputs:
    """The inputs with the number in one place of a leaf, in all of them where no place is given.

    Tensors of modules are changed in place; other containers are made anew, whose own checks are the method's.
    """
    leaf = dict(leaves(given))[path]
    if isinstance(leaf, float):
        return replaced(given, path, lambda _: number)
    if isinstance(leaf, Tensor):
        leaf = leaf.detach()
    chosen = slice(None) if place is None else np.unravel_index(place * leaf_size(leaf) // PLACES, leaf.shape)
    leaf[chosen] = number
    try:
        return replaced(given, path, lambda _: leaf)
    except InPlace:
        return given


def leaf_size(leaf: Tensor | np.ndarray) -> int:
    return leaf.numel() if isinstance(leaf, Tensor) else leaf.size
