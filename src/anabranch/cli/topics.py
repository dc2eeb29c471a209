# SPDX-License-Identifier: Apache-2.0
"""A command of several topics: `anabranch COMMAND TOPIC`, each topic a file of its own, cli/COMMAND_TOPIC.py."""

from collections.abc import Mapping
from importlib import import_module

from anabranch.errors import DONE, UsageError, did_you_mean


def usage(command: str, purpose: str, topics: Mapping[str, str]) -> str:
    width = max(map(len, topics))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, what in topics.items())
    return (
        f"{purpose}\n\nusage: anabranch {command} TOPIC [OPTIONS]\n\n{rows}\n\n"
        f"  anabranch {command} TOPIC --help   the options of a topic\n"
    )


def run_topic(command: str, purpose: str, topics: Mapping[str, str], argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(command, purpose, topics))
        return DONE
    if argv[0] not in topics:
        raise UsageError(f"anabranch {command} has no topic {argv[0]!r}", hint=did_you_mean(argv[0], topics))
    code: int = import_module(f"anabranch.cli.{command}_{argv[0]}").main(argv[1:])
    return code
