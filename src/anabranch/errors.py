# SPDX-License-Identifier: Apache-2.0
"""Errors that a person can act on: what is wrong, what was expected, what was received, what to try."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

DONE, FAILED, WRONG_USAGE, CHECK_FAILED, STOPPED = 0, 1, 2, 3, 75


class AnabranchError(Exception):
    """The run failed. `str(error)` is the whole message, one fact a line."""

    exit_code = FAILED

    def __init__(self, what: str, *, expected: object = None, received: object = None, hint: str | None = None):
        facts = [("expected", expected), ("received", received), ("try", hint)]
        super().__init__("\n".join([what, *(f"  {name}: {fact}" for name, fact in facts if fact is not None)]))
        self.what = what


class UsageError(AnabranchError):
    """The request itself is wrong; nothing was started."""

    exit_code = WRONG_USAGE


class CheckFailed(AnabranchError):
    """The work finished, but a check on its result did not hold."""

    exit_code = CHECK_FAILED


class Stopped(AnabranchError):
    """A signal ended the run after a finished checkpoint; the same command with `--resume` goes on."""

    exit_code = STOPPED


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known one, else all of them."""
    known = sorted(known)
    if not known:
        return "none is known"
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"


def near(missing: Path, otherwise: str | None = None) -> str | None:
    """A hint for a folder that is not there: the one beside it of nearly that name, else what else to try."""
    if missing.exists() or not missing.parent.is_dir():
        return otherwise
    close = get_close_matches(missing.name, [path.name for path in missing.parent.iterdir() if path.is_dir()], n=1)
    return f"did you mean {missing.parent / close[0]}?" if close else otherwise
