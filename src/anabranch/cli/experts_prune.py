# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts prune`: see anabranch.jobs.experts.prune."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import PruneFlags, PruneSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[PruneSettings], PruneFlags):
    """Keep the experts that a task needs, in a stock checkpoint; what that costs is told for every label."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts prune")
    from anabranch.jobs.experts.prune import experts_prune

    experts_prune(settings)
    return DONE
