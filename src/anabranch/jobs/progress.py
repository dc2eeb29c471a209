# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a rich bar on a terminal, plain lines otherwise."""

import sys
import time

from anabranch.train.processes import processes


class Progress:
    """`with Progress("models", total=18) as progress: progress.advance("garments, seed 0: loss 0.51")`."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.done, self.before = what, total, done, done
        self.started = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self.bar.start()
            self.row = self.bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, note: str, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.row, advance=count, description=note)
            return
        seconds = time.monotonic() - self.started
        left = seconds / max(self.done - self.before, 1) * (self.total - self.done)
        print(f"{self.what} {self.done}/{self.total}  {note}  ({left:.0f} s left)", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A plain line, of the first process alone."""
    if processes().is_main_process:
        print(line, flush=True)
