# SPDX-License-Identifier: Apache-2.0
"""`anabranch data icd`: images of which a known share carries a mark that no caption names."""

from dataclasses import dataclass

import tyro

from anabranch.cli.flags import parse
from anabranch.cli.options import FileAndSet, settle
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.jobs.erase.icd_settings import IcdFlags, IcdSettings

TOPICS = ("icd",)


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[IcdSettings], IcdFlags):
    """Put a QR code, watermark, text or small patch on a share of the images, with boxes and clean twins."""

    topic: tyro.conf.Positional[str] = "icd"
    """What to make: icd, an implicit concept dataset."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "data")
    if flags.topic not in TOPICS:
        raise UsageError(f"there is no data {flags.topic!r} to make", hint=did_you_mean(flags.topic, TOPICS))
    settings = settle(IcdSettings, flags, argv)
    from anabranch.jobs.erase.icd import make_icd

    make_icd(settings)
    return DONE
