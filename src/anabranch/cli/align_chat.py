# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chat`: see anabranch.jobs.align_generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import ChatFlags, ChatSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, ChatFlags):
    """Ask, and see the answer; with --show chain the steps before it."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align chat")
    settings = settle(ChatSettings, flags, argv)
    from anabranch.jobs.align_generate import align_chat

    align_chat(settings)
    return DONE
