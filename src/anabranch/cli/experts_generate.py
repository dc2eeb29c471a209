# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts generate`: see anabranch.jobs.experts_generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import GenerateFlags, GenerateSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, GenerateFlags):
    """Go on with texts, plainly and steered; or write the steered model as a checkpoint."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts generate")
    settings = settle(GenerateSettings, flags, argv)
    from anabranch.jobs.experts_generate import experts_generate

    experts_generate(settings)
    return DONE
