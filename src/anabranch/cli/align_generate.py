# SPDX-License-Identifier: Apache-2.0
"""`anabranch align generate`: see anabranch.jobs.align.generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import GenerateFlags, GenerateSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[GenerateSettings], GenerateFlags):
    """Answer a file of questions with the experts of the steps."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align generate")
    from anabranch.jobs.align.generate import align_generate

    align_generate(settings)
    return DONE
