# SPDX-License-Identifier: Apache-2.0
"""`anabranch customize`: for one task, the ordinary checkpoint that serves it."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.transfer.settings import CustomizeFlags, CustomizeSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[CustomizeSettings], CustomizeFlags):
    """Pick the route that serves a task and write it as a plain ViT folder that transformers opens."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "customize")
    from anabranch.jobs.transfer.customize import customize

    customize(settings)
    return DONE
