# SPDX-License-Identifier: Apache-2.0
"""`anabranch completion SHELL`: a script that completes commands, topics, flags and their choices in bash, zsh or fish.

It is made from the commands themselves, so that a new flag needs no second entry; nothing of it runs this package.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import tyro

from anabranch.cli import COMMANDS
from anabranch.cli.choices import choices_of, number_of
from anabranch.cli.completion_shells import SCRIPTS
from anabranch.cli.flags import OFFERS, fields_by_flag, parse
from anabranch.errors import DONE, UsageError, did_you_mean

TOPICS = tuple(SCRIPTS)
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
        if not isinstance(topics, dict):
            yield Place((command,), purpose, tuple(topics), **offered(module.Flags))
            continue
        yield Place((command,), purpose, tuple(topics))
        for topic, told in topics.items():
            yield Place((command, topic), told, **offered(import_module(f"anabranch.cli.{command}_{topic}").Flags))


def offered(flags: Any) -> dict[str, Any]:
    fields = fields_by_flag(flags)
    switches = [name for name, field in fields.items() if field.type is bool]
    values = {name: values_of(flags, field) for name, field in fields.items() if name not in switches}
    return {"flags": tuple(values.items()), "switches": ("--help", *switches)}


def values_of(flags: Any, field: Any) -> tuple[str, ...] | None:
    """What the command offers itself, else its choices; nothing for a number, else files."""
    if offers := field.metadata.get(OFFERS):
        return tuple(offers(flags))
    return choices_of(field.type) or (() if number_of(field.type) else FILES)
