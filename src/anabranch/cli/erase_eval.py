# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase eval`: see anabranch.jobs.erase.eval."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.erase.settings import EvalFlags, EvalSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[EvalSettings], EvalFlags):
    """Count how often the concept is drawn, before, after and under attack, and what erasing cost."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "erase eval")
    from anabranch.jobs.erase.eval import erase_eval

    erase_eval(settings)
    return DONE
