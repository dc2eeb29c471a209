# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts generate`: see anabranch.jobs.experts.generate."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import GenerateFlags, GenerateSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[GenerateSettings], GenerateFlags):
    """Go on with texts, plainly and steered; or write the steered model as a checkpoint."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts generate")
    from anabranch.jobs.experts.generate import experts_generate

    experts_generate(settings)
    return DONE
