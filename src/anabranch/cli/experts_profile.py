# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts profile`: see anabranch.jobs.experts.profile."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.experts.settings import ProfileFlags, ProfileSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[ProfileSettings], ProfileFlags):
    """Read labelled texts once, and keep what every router and expert did on them."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "experts profile")
    from anabranch.jobs.experts.profile import experts_profile

    experts_profile(settings)
    return DONE
