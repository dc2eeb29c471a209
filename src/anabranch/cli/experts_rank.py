# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts rank`: see anabranch.jobs.experts.rank."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import RankFlags, RankSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[RankSettings], RankFlags):
    """Which experts belong to a label, by every ranking that the statistics allow."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts rank")
    from anabranch.jobs.experts.rank import experts_rank

    experts_rank(settings)
    return DONE
