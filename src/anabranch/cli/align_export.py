# SPDX-License-Identifier: Apache-2.0
"""`anabranch align export`: see anabranch.jobs.align.export."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import ExportFlags, ExportSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[ExportSettings], ExportFlags):
    """Write every step as one plain LoRA, for engines that take an adapter a request."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align export")
    from anabranch.jobs.align.export import align_export

    align_export(settings)
    return DONE
