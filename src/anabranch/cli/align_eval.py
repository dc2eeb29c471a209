# SPDX-License-Identifier: Apache-2.0
"""`anabranch align eval`: see anabranch.jobs.align.eval."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import EvalFlags, EvalSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[EvalSettings], EvalFlags):
    """Is it harmless, and still of use? Base and experts on the same questions, with intervals."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align eval")
    from anabranch.jobs.align.eval import align_eval

    align_eval(settings)
    return DONE
