# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts tune`: see anabranch.jobs.experts_tune."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import TuneFlags, TuneSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, TuneFlags):
    """Let only the experts that a task uses learn it; everything else stays bit for bit."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts tune")
    settings = settle(TuneSettings, flags, argv)
    from anabranch.jobs.experts_tune import experts_tune

    experts_tune(settings)
    return DONE
