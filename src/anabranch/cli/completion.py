# SPDX-License-Identifier: Apache-2.0
"""`anabranch completion SHELL`: a script that completes commands, topics, flags and their choices in bash, zsh or fish.

It is made from the commands themselves, so that a new flag needs no second entry; nothing of it runs this package.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from anabranch.cli import COMMANDS
from anabranch.cli.choices import NUMBERS, alternatives
from anabranch.cli.completion_shells import SCRIPTS
from anabranch.cli.flags import parse
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.registry import cards

TOPICS = tuple(SCRIPTS)
POSITIONAL = get_args(tyro.conf.Positional[str])[1]
FILES = None
"""Of a flag: files are offered."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Print a script of completions. bash: eval "$(anabranch completion bash)" in ~/.bashrc; zsh: the same with zsh in
    ~/.zshrc after compinit; fish: anabranch completion fish > ~/.config/fish/completions/anabranch.fish"""

    shell: tyro.conf.Positional[str] = ""
    """bash, zsh or fish."""


@dataclass(frozen=True)
class Place:
    """What can follow `anabranch WORDS`."""

    words: tuple[str, ...]
    purpose: str
    topics: tuple[str, ...] = ()
    flags: tuple[tuple[str, tuple[str, ...] | None], ...] = ()
    """(flag, the values it is given): () where it takes none or any number, FILES where a path may be meant."""
    switches: tuple[str, ...] = ("--help",)
    """Those of the flags that no value follows."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "completion")
    if flags.shell not in SCRIPTS:
        hint = did_you_mean(flags.shell, SCRIPTS) if flags.shell else None
        received = flags.shell or "nothing"
        raise UsageError("which shell?", expected=", ".join(SCRIPTS), received=received, hint=hint)
    print(SCRIPTS[flags.shell](list(places())), end="")
    return DONE


def places() -> Iterator[Place]:
    """Every command and topic, the empty place first."""
    yield Place((), "", tuple(COMMANDS), switches=("--help", "--version"))
    for command, purpose in COMMANDS.items():
        module = import_module(f"anabranch.cli.{command}")
        topics = getattr(module, "TOPICS", ())
        nested = isinstance(topics, dict)
        yield Place((command,), purpose, tuple(topics), **({} if nested else flags_of(module)))
        for topic in topics if nested else ():
            name = f"anabranch.cli.{command}_{topic}"
            if find_spec(name):
                yield Place((command, topic), topics[topic], **flags_of(import_module(name)))


def flags_of(module: ModuleType) -> dict[str, Any]:
    flags, switches = [], ["--help"]
    for field in dataclasses.fields(module.Flags):
        if get_origin(field.type) is Annotated and POSITIONAL in get_args(field.type)[1:]:
            continue
        name = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            switches.append(f"--no-{name[2:]}" if field.default is True else name)
        else:
            flags.append((name, values(module, field)))
    return {"flags": tuple(flags), "switches": tuple(switches)}


def values(module: ModuleType, field: "dataclasses.Field[Any]") -> tuple[str, ...] | None:
    """Choices, names of settings, keys of methods; nothing for a number, else files."""
    if field.name == "set":
        return tuple(f"{name}=" for name in settings_of(module))
    if (module.__name__, field.name) == ("anabranch.cli.list", "method"):
        return tuple(cards())
    kinds = [kind for kind in alternatives(field.type) if kind is not type(None)]
    if all(get_origin(kind) is Literal for kind in kinds):
        return tuple(str(choice) for kind in kinds for choice in get_args(kind))
    return () if all(kind in NUMBERS for kind in kinds) else FILES


def settings_of(module: ModuleType) -> list[str]:
    """What `--set` may name: the fields of the settings that the command makes of its flags."""
    found = [kind for name, kind in vars(module).items() if name.endswith("Settings")]
    return [field.name for kind in found if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
