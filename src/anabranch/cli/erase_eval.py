# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase eval`: see anabranch.jobs.erase_eval."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.erase_settings import EvalFlags, EvalSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, EvalFlags):
    """Count how often the concept is drawn, before, after and under attack, and what erasing cost."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "erase eval")
    settings = settle(EvalSettings, flags, argv)
    from anabranch.jobs.erase_eval import erase_eval

    erase_eval(settings)
    return DONE
