# SPDX-License-Identifier: Apache-2.0
"""`anabranch align eval`: see anabranch.jobs.align_eval."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import EvalFlags, EvalSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, EvalFlags):
    """Is it harmless, and still of use? Base and experts on the same questions, with intervals."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align eval")
    settings = settle(EvalSettings, flags, argv)
    from anabranch.jobs.align_eval import align_eval

    align_eval(settings)
    return DONE
