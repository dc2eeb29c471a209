# SPDX-License-Identifier: Apache-2.0
"""Stop on request: SIGTERM and SIGUSR1 set a flag that every long loop polls; a second signal ends the process at once.

    with StopFlag() as stop:
        for step in range(steps):
            ...
            stop.check("clustering stopped after step 3")  # raises Stopped (exit code 75) once a signal came

Flags nest: a signal that reaches the inner one reaches the outer ones too, so none is lost between two loops.
"""

import signal
import threading
from types import FrameType
from typing import Any

from anabranch.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Context manager; outside the main thread, where Python allows no handlers, it is set as the main one's is."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._main: StopFlag | None = None

    @property
    def is_set(self) -> bool:
        return self.number is not None

    @property
    def number(self) -> int | None:
        """Of the signal that came."""
        return self.received if self._main is None else self._main.number

    def check(self, what: str) -> None:
        """Raise Stopped if a signal came; for loops that have nothing to save first."""
        if (number := self.number) is not None:
            raise Stopped(f"{what} ({signal.Signals(number).name} received)")

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)
            self.received = next((flag.received for flag in self._outer_flags() if flag.is_set), None)
        else:
            owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            self._main = owner if isinstance(owner, StopFlag) else None
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        for flag in self._outer_flags():
            flag.received = number

    def _outer_flags(self) -> list["StopFlag"]:
        """Flags around this one, nearest first; they are found through the handlers that this one replaced."""
        flags: list[StopFlag] = []
        owner = getattr(self._previous.get(signal.SIGTERM), "__self__", None)
        while isinstance(owner, StopFlag):
            flags.append(owner)
            owner = getattr(owner._previous.get(signal.SIGTERM), "__self__", None)
        return flags
