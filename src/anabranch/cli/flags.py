# SPDX-License-Identifier: Apache-2.0
"""How a command line is read: which flags a command has, which are written, which values their types refuse; then tyro,
which is loaded only once there is something to read."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

from anabranch.cli.choices import refuse
from anabranch.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Flags = TypeVar("Flags", bound="DataclassInstance")
OFFERS = "offers"
"""In a field's metadata: a function of the command's flags that gives the values which completion offers."""


def parse(flags: type[Flags], argv: list[str], command: str) -> Flags:
    """The flags of one command; a misspelt one gets a suggestion."""
    fields = fields_by_flag(flags)
    known = [*fields, "--help"]
    for name, value in written(argv):
        if name not in known:
            by_place = any(spelled(field) == name for field in dataclasses.fields(flags))
            hint = f"anabranch {command} {name[2:].upper()}" if by_place else did_you_mean(name, known)
            raise UsageError(f"anabranch {command} has no option {name}", hint=hint)
        if name in fields and value is not None:
            refuse(name, fields[name].type, value)
    if not argv and not any(map(required, dataclasses.fields(flags))):
        return flags()
    import tyro

    return tyro.cli(flags, args=argv, prog=f"anabranch {command}", config=(tyro.conf.FlagCreatePairsOff,))


def written(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """(flag, its first value) of `--flag value` and `--flag=value`; None where no value follows."""
    for argument, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            given = value if equals else None if following.startswith("--") else following
            yield name.replace("_", "-"), given


def fields_by_flag(flags: "type[DataclassInstance]") -> "dict[str, dataclasses.Field[Any]]":
    """By the flag as it is typed; what is given by its place alone has none."""
    return {spelled(field): field for field in dataclasses.fields(flags) if not positional(field)}


def spelled(field: "dataclasses.Field[Any]") -> str:
    """--name; --no-name of a switch that is on by default."""
    turns_off = field.type is bool and field.default is True
    return ("--no-" if turns_off else "--") + field.name.replace("_", "-")


def positional(field: "dataclasses.Field[Any]") -> bool:
    if get_origin(field.type) is not Annotated:  # only who imported tyro can have said so
        return False
    import tyro

    return get_args(tyro.conf.Positional[str])[1] in get_args(field.type)[1:]


def required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
