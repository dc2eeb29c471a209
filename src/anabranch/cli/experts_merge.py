# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts merge`: see anabranch.jobs.experts.merge."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import MergeFlags, MergeSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[MergeSettings], MergeFlags):
    """Let experts that are alike share their weights, in a stock checkpoint; what that costs is told for each label."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts merge")
    from anabranch.jobs.experts.merge import experts_merge

    experts_merge(settings)
    return DONE
