# SPDX-License-Identifier: Apache-2.0
"""`anabranch measure`: does sharing hurt?"""

from dataclasses import dataclass

from anabranch.cli.options import FileAndSet, read
from anabranch.errors import DONE
from anabranch.jobs.transfer.settings import MeasureFlags, MeasureSettings


@dataclass(frozen=True, kw_only=True)
class Flags(FileAndSet[MeasureSettings], MeasureFlags):
    """Does one shared model hurt a task? Trains a model a source and one on all, and probes each on every task."""


def main(argv: list[str]) -> int:
    settings = read(Flags, argv, "measure")
    from anabranch.jobs.progress import say
    from anabranch.jobs.transfer.measure import measure

    result = measure(settings)
    say("\n".join(task["sentence"] for task in result["tasks"]))
    say(f"\nmatrix  {settings.out / 'transfer.json'}\npage    {settings.out / 'report.html'}")
    return DONE
