# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chat`: see anabranch.jobs.align.generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import ChatFlags, ChatSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[ChatSettings], ChatFlags):
    """Ask, and see the answer; with --show chain the steps before it."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align chat")
    from anabranch.jobs.align.generate import align_chat

    align_chat(settings)
    return DONE
