# SPDX-License-Identifier: Apache-2.0
"""The flags of one command, read by tyro; it is loaded only once there is something to read."""

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from anabranch.cli.choices import refuse_flags
from anabranch.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Flags = TypeVar("Flags", bound="DataclassInstance")


def parse(flags: type[Flags], argv: list[str], command: str) -> Flags:
    """The flags of one command; a misspelt one gets a suggestion."""
    names = flag_names(flags)
    known = {*names, *(f"--no-{name[2:]}" for name in names), "--help"}
    for name in given_flags(argv):
        if name not in known:
            raise UsageError(f"anabranch {command} has no option {name}", hint=did_you_mean(name, names))
    refuse_flags(flags, argv)
    if not argv and not any(required(field) for field in dataclasses.fields(flags)):
        return flags()
    import tyro

    return tyro.cli(flags, args=argv, prog=f"anabranch {command}", config=(tyro.conf.FlagCreatePairsOff,))


def flag_names(flags: "type[DataclassInstance]") -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(flags)]


def required(field: "dataclasses.Field[object]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def given_flags(argv: list[str]) -> list[str]:
    return [argument.split("=")[0].replace("_", "-") for argument in argv if argument.startswith("--")]
