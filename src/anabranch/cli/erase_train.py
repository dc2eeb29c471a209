# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase train`: see anabranch.jobs.erase.train."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.erase.settings import TrainFlags, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[TrainSettings], TrainFlags):
    """Learn what the concept is called and where it is, so that its absence can be asked for. Writes an adapter."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "erase train")
    from anabranch.jobs.erase.train import erase_train

    erase_train(settings)
    return DONE
