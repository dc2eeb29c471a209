# SPDX-License-Identifier: Apache-2.0
"""Rows of results as files of JSON lines, which recipes leave for one another."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """No rows where there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write(file: Path, rows: Iterable[dict[str, Any]], *, append: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a" if append else "w", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(row) + "\n" for row in rows))
