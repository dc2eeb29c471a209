# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase scan`: which images contain the concept, and where."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.erase.scan_settings import ScanFlags, ScanSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[ScanSettings], ScanFlags):
    """Look through a folder of images with a detector. Writes labels that `anabranch erase train` learns from."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "erase scan")
    from anabranch.jobs.erase.scan import scan

    scan(settings)
    return DONE
