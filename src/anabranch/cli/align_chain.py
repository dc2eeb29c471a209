# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chain`: see anabranch.jobs.align.chain."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.align.settings import ChainFlags, ChainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[ChainSettings], ChainFlags):
    """Let the model write the chains that it is trained on: analysis, guidance and answer, as far as each question
    needs them."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "align chain")
    from anabranch.jobs.align.chain import align_chain

    align_chain(settings)
    return DONE
