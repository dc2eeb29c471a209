# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts steer`: see anabranch.jobs.experts.steer."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import SteerFlags, SteerSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[SteerSettings], SteerFlags):
    """From statistics to a recipe of what is done to the routing."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts steer")
    from anabranch.jobs.experts.steer import experts_steer

    experts_steer(settings)
    return DONE
