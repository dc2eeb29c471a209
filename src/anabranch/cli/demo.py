# SPDX-License-Identifier: Apache-2.0
"""`anabranch demo transfer`: the whole story on images that ship with the package."""

from dataclasses import dataclass

import tyro

from anabranch.cli.options import parse
from anabranch.errors import DONE
from anabranch.jobs.settings import DemoFlags


@dataclass(frozen=True, kw_only=True)
class Flags(DemoFlags):
    """See where sharing hurts, what experts do about it, and hold an ordinary checkpoint for each task."""

    topic: tyro.conf.Positional[str] = "transfer"


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "demo")
    from anabranch.jobs.demo import demo

    demo(DemoFlags(**vars(flags)))
    return DONE
