# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object a line, each with its step, flushed as it is written.

A process that dies while writing leaves at most a torn last line, which the reader passes over. A resumed run drops the
lines beyond the step that it resumes from, so that each step is told once.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    return [line for line, _ in _lines(path)]


class MetricsWriter:
    """Appends lines after dropping those beyond `after_step` and a torn last one."""

    def __init__(self, path: Path, *, after_step: int = 0):
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

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MeanWindow:
    """Means of scalars since the last line; they are read from the device only when a line is due."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            scalar = value.detach().reshape(()).float()
            # A new tensor each time: the objective may go on changing the one that it gave us.
            self._sums[name] = scalar + (self._sums[name].to(scalar.device) if name in self._sums else 0)
            self._counts[name] = self._counts.get(name, 0) + 1

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means, and an empty window. `reduce` averages over processes, all of which must have the same names."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        self._sums, self._counts = {}, {}
        return dict(zip(names, reduce(means).tolist(), strict=True))

    def to_json(self) -> dict[str, list[float]]:
        """A half-full window goes into the checkpoint, so that a resumed run writes the lines it would have written."""
        return {name: [total.item(), self._counts[name]] for name, total in self._sums.items()}

    @classmethod
    def from_json(cls, state: Mapping[str, list[float]]) -> "MeanWindow":
        window = cls()
        window._sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        window._counts = {name: int(count) for name, (_, count) in state.items()}
        return window


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
        except (ValueError, TypeError, KeyError):
            complete = False
        if not complete:
            if number == len(raw_lines):
                break
            raise AnabranchError(f"{path}, line {number}: expected a JSON object with a step")
        parsed.append((line, offset))
    return parsed
