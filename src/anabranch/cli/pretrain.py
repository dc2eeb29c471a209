# SPDX-License-Identifier: Apache-2.0
"""`anabranch pretrain`: learn from images, with experts for their clusters or without."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.transfer.settings import PretrainFlags, PretrainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[PretrainSettings], PretrainFlags):
    """Learn from folders of images. Writes a run that `anabranch customize` takes models from."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "pretrain")
    from anabranch.jobs.transfer.pretrain import pretrain

    pretrain(settings)
    return DONE
