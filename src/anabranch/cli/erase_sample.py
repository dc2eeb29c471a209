# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase sample`: see anabranch.jobs.erase_sample."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.erase_settings import SampleFlags, SampleSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, SampleFlags):
    """Draw pictures with the concept as negative prompt, or the model as it is."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "erase sample")
    settings = settle(SampleSettings, flags, argv)
    from anabranch.jobs.erase_sample import erase_sample

    erase_sample(settings)
    return DONE
