# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object a line, each with its step, flushed as it is written.

A process that dies while writing leaves at most a torn last line, which the reader passes over. A resumed run drops the
lines beyond the step that it resumes from, so that each step is told once.

A tracker (trackers.py) hears every number that is written here, and nothing else.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    try:
        return [line for line, _ in _lines(path)]
    except OSError as error:
        raise AnabranchError(f"{path} cannot be read", received=error.strerror) from error


class MetricsWriter:
    """Appends lines after dropping those beyond `after_step` and a torn last one.

    tracker    one of accelerate's, started; it is told what is written, and closed with the file
    """

    def __init__(self, path: Path, *, after_step: int = 0, tracker: Any = None):
        self._tracker = tracker
        if path.exists():
            end = 0
            for line, offset in _lines(path):
                if line["step"] > after_step:
                    break
                end = offset
            os.truncate(path, end)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        """Numbers that JSON has no words for (NaN, infinity) become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tracker is not None:
            numbers = {name: value for name, value in finite.items() if value is not None}
            self._tell(lambda tracker: tracker.log(numbers, step=step))

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tell(lambda tracker: tracker.finish())
            self._tracker = None

    def _tell(self, what: Callable[[Any], object]) -> None:
        """The file is the record; a tracker that fails is let go."""
        try:
            what(self._tracker)
        except Exception as error:
            name, self._tracker = getattr(self._tracker, "name", "?"), None
            told = f"the tracker {name} failed and hears no more; metrics.jsonl goes on"
            warnings.warn(f"{told}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MeanWindow:
    """Means of scalars since the last line."""

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None):
        self._sums = {name: (total, int(count)) for name, (total, count) in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def close(self) -> dict[str, float]:
        """The means, and an empty window."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def to_json(self) -> dict[str, list[float]]:
        """A half-full window goes into the checkpoint, so that a resumed run writes the lines it would have written."""
        return {name: [total, count] for name, (total, count) in self._sums.items()}


def _lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each complete line with the byte offset behind it."""
    parsed: list[tuple[dict[str, Any], int]] = []
    offset = 0
    raw_lines = path.read_bytes().splitlines(keepends=True)
    for number, raw in enumerate(raw_lines, start=1):
        offset += len(raw)
        try:
            line = json.loads(raw)
            complete = raw.endswith(b"\n") and isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            complete = False
        if not complete:
            if number == len(raw_lines):
                break
            raise AnabranchError(f"{path}, line {number}: expected a JSON object with a step")
        parsed.append((line, offset))
    return parsed
