# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase scan`: which images contain the concept, and where."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.scan_settings import ScanFlags, ScanSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, ScanFlags):
    """Look through a folder of images with a detector. Writes labels that `anabranch erase train` learns from."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "erase scan")
    settings = settle(ScanSettings, flags, argv)
    from anabranch.jobs.scan import scan

    scan(settings)
    return DONE
