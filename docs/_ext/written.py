# SPDX-License-Identifier: Apache-2.0
"""A folder of generated pages: what has not changed keeps its time, what was not written again goes."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Folder:
    def __init__(self, path: Path):
        self.path = path
        self.kept: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        self.kept.add(path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            for path in self.path.rglob("*"):
                if path.is_file() and path not in self.kept:
                    path.unlink()
