# SPDX-License-Identifier: Apache-2.0
"""`anabranch align export`: see anabranch.jobs.align_export."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import ExportFlags, ExportSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, ExportFlags):
    """Write every step as one plain LoRA, for engines that take an adapter a request."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align export")
    settings = settle(ExportSettings, flags, argv)
    from anabranch.jobs.align_export import align_export

    align_export(settings)
    return DONE
