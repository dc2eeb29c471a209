# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts profile`: see anabranch.jobs.experts_profile."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.experts_settings import ProfileFlags, ProfileSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, ProfileFlags):
    """Read labelled texts once, and keep what every router and expert did on them."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts profile")
    settings = settle(ProfileSettings, flags, argv)
    from anabranch.jobs.experts_profile import experts_profile

    experts_profile(settings)
    return DONE
