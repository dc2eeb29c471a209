# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts families`: see anabranch.jobs.experts.families."""

from dataclasses import dataclass
from pathlib import Path

from anabranch.cli.flags import parse
from anabranch.errors import DONE


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Every family of models that is known, through every operation; or a model of yours."""

    model: Path | None = None
    """A folder that transformers wrote, of a mixture of experts; tiny models of all families when left out."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "experts families")
    from anabranch.jobs.experts.families import experts_families

    experts_families(flags.model)
    return DONE
