# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase bake`: see anabranch.jobs.erase_bake."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.erase_settings import BakeFlags, BakeSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, BakeFlags):
    """Put the negative prompt into a LoRA, for models and tools that take none."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "erase bake")
    settings = settle(BakeSettings, flags, argv)
    from anabranch.jobs.erase_bake import erase_bake

    erase_bake(settings)
    return DONE
