# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts prune`: see anabranch.jobs.experts_prune."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import PruneFlags, PruneSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, PruneFlags):
    """Keep the experts that a task needs, in a stock checkpoint; what that costs is told for every label."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts prune")
    settings = settle(PruneSettings, flags, argv)
    from anabranch.jobs.experts_prune import experts_prune

    experts_prune(settings)
    return DONE
