# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts merge`: see anabranch.jobs.experts_merge."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import MergeFlags, MergeSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, MergeFlags):
    """Let experts that are alike share their weights, in a stock checkpoint; what that costs is told for each label."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts merge")
    settings = settle(MergeSettings, flags, argv)
    from anabranch.jobs.experts_merge import experts_merge

    experts_merge(settings)
    return DONE
