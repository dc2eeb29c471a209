# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chain`: see anabranch.jobs.align_chain."""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, parse, settle
from anabranch.errors import DONE
from anabranch.jobs.align_settings import ChainFlags, ChainSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet, ChainFlags):
    """Let the model write the chains that it is trained on: analysis, guidance and answer, as far as each question
    needs them."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "align chain")
    settings = settle(ChainSettings, flags, argv)
    from anabranch.jobs.align_chain import align_chain

    align_chain(settings)
    return DONE
