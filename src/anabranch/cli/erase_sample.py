# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase sample`: see anabranch.jobs.erase.sample."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.erase.settings import SampleFlags, SampleSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[SampleSettings], SampleFlags):
    """Draw pictures with the concept as negative prompt, or the model as it is."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "erase sample")
    from anabranch.jobs.erase.sample import erase_sample

    erase_sample(settings)
    return DONE
