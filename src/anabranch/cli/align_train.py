# SPDX-License-Identifier: Apache-2.0
"""`anabranch align train`: see anabranch.jobs.align_train."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import TrainFlags, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, TrainFlags):
    """Train one expert a step, and one that all steps share, on the model's own chains."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align train")
    settings = settle(TrainSettings, flags, argv)
    from anabranch.jobs.align_train import align_train

    align_train(settings)
    return DONE
