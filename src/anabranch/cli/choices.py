# SPDX-License-Identifier: Apache-2.0
"""Values that can be seen to be wrong by their type alone, refused in the words of this library and with a suggestion.

What passes here is still read and checked by tyro or pydantic; neither is loaded for what does not.
"""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from anabranch.errors import UsageError, did_you_mean

NUMBERS = {int: "a whole number", float: "a number"}


def refuse(name: str, kind: Any, value: Any) -> None:
    """
    Raises:
        UsageError: a value that is none of the choices, or text where a number is wanted.
    """
    if not isinstance(value, str) or (value.lower() == "none" and NoneType in alternatives(kind)):
        return
    choices, number = choices_of(kind), number_of(kind)
    if choices and value not in choices:
        hint = did_you_mean(value, choices)
        close = hint if hint.startswith("did you mean") else None  # else it lists what is listed already
        raise UsageError(f"{name} cannot be used", expected=", ".join(choices), received=repr(value), hint=close)
    if number and not reads_as(number, value):
        raise UsageError(f"{name} cannot be used", expected=NUMBERS[number], received=repr(value))


def choices_of(kind: Any) -> tuple[str, ...]:
    """Of a type that is a choice, and perhaps None; () of any other."""
    wanted = [one for one in alternatives(kind) if one is not NoneType]
    choices = [str(choice) for one in wanted for choice in get_args(one)]
    return tuple(choices) if all(get_origin(one) is Literal for one in wanted) else ()


def number_of(kind: Any) -> type | None:
    """int or float of a type that is one of them, and perhaps None."""
    wanted = [one for one in alternatives(kind) if one is not NoneType]
    return wanted[0] if len(wanted) == 1 and wanted[0] in NUMBERS else None


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, without what only tyro reads; a single type is a union of one."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def reads_as(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
