# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase bake`: see anabranch.jobs.erase.bake."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.erase.settings import BakeFlags, BakeSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[BakeSettings], BakeFlags):
    """Put the negative prompt into a LoRA, for models and tools that take none."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "erase bake")
    from anabranch.jobs.erase.bake import erase_bake

    erase_bake(settings)
    return DONE
