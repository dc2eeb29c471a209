# SPDX-License-Identifier: Apache-2.0
"""`anabranch align generate`: see anabranch.jobs.align_generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import GenerateFlags, GenerateSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, GenerateFlags):
    """Answer a file of questions with the experts of the steps."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align generate")
    settings = settle(GenerateSettings, flags, argv)
    from anabranch.jobs.align_generate import align_generate

    align_generate(settings)
    return DONE
