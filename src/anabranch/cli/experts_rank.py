# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts rank`: see anabranch.jobs.experts_rank."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import RankFlags, RankSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, RankFlags):
    """Which experts belong to a label, by every ranking that the statistics allow."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts rank")
    settings = settle(RankSettings, flags, argv)
    from anabranch.jobs.experts_rank import experts_rank

    experts_rank(settings)
    return DONE
