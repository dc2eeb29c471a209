# SPDX-License-Identifier: Apache-2.0
"""Values that can be seen to be wrong by their type alone, refused in the words of this library and with a suggestion.

What passes here is still read and checked by tyro or pydantic; neither is loaded for what does not.
"""

import dataclasses
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from anabranch.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NUMBERS = {int: "a whole number", float: "a number"}


def refuse_flags(flags: "type[DataclassInstance]", argv: list[str]) -> None:
    """The first written value of every flag whose type says what it can be."""
    types = {f"--{field.name.replace('_', '-')}": field.type for field in dataclasses.fields(flags)}
    for name, value in written(argv):
        if name in types:
            refuse(name, types[name], value)


def written(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(flag, its first value) of `--flag value` and `--flag=value`."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        if equals:
            yield name.replace("_", "-"), value
        elif i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            yield name.replace("_", "-"), argv[i + 1]


def refuse(name: str, kind: Any, value: Any) -> None:
    """
    Raises:
        UsageError: a value that is none of the choices, or text where a number is wanted.
    """
    kinds = alternatives(kind)
    if not isinstance(value, str) or (value.lower() == "none" and NoneType in kinds):
        return
    wanted = [one for one in kinds if one is not NoneType]
    if wanted and all(get_origin(one) is Literal for one in wanted):
        choices = [str(choice) for one in wanted for choice in get_args(one)]
        if value not in choices:
            hint = did_you_mean(value, choices)
            close = hint if hint.startswith("did you mean") else None  # else it lists what is listed already
            raise UsageError(f"{name} cannot be used", expected=", ".join(choices), received=repr(value), hint=close)
    elif len(wanted) == 1 and wanted[0] in NUMBERS and not reads_as(wanted[0], value):
        raise UsageError(f"{name} cannot be used", expected=NUMBERS[wanted[0]], received=repr(value))


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
