# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase train`: see anabranch.jobs.erase_train."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.erase_settings import TrainFlags, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, TrainFlags):
    """Learn what the concept is called and where it is, so that its absence can be asked for. Writes an adapter."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "erase train")
    settings = settle(TrainSettings, flags, argv)
    from anabranch.jobs.erase_train import erase_train

    erase_train(settings)
    return DONE
