# SPDX-License-Identifier: Apache-2.0
"""`anabranch report RUN`: the page of a run, built again from its files."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from anabranch.cli.flags import parse
from anabranch.errors import DONE


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Build the page of a run again, finished or not."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "report")
    from anabranch.jobs.pages import write_page

    print(write_page(flags.run))
    return DONE
