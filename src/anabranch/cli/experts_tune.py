# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts tune`: see anabranch.jobs.experts.tune."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import TuneFlags, TuneSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[TuneSettings], TuneFlags):
    """Let only the experts that a task uses learn it; everything else stays bit for bit."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts tune")
    from anabranch.jobs.experts.tune import experts_tune

    experts_tune(settings)
    return DONE
