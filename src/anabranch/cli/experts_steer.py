# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts steer`: see anabranch.jobs.experts_steer."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import SteerFlags, SteerSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, SteerFlags):
    """From statistics to a recipe of what is done to the routing."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts steer")
    settings = settle(SteerSettings, flags, argv)
    from anabranch.jobs.experts_steer import experts_steer

    experts_steer(settings)
    return DONE
