# SPDX-License-Identifier: Apache-2.0
"""`anabranch align train`: see anabranch.jobs.align.train."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import TrainFlags, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[TrainSettings], TrainFlags):
    """Train one expert a step, and one that all steps share, on the model's own chains."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align train")
    from anabranch.jobs.align.train import align_train

    align_train(settings)
    return DONE
