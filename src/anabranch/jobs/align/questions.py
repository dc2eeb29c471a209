# SPDX-License-Identifier: Apache-2.0
"""A file of questions: rows of JSON, or plain lines."""

import json
from pathlib import Path
from typing import Any

from anabranch.errors import UsageError, did_you_mean

KINDS = ("harmful", "benign", "look-alike", "jailbreak")
ROLES = ("system", "user", "assistant")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """[{"id", "question": text or messages, ...}]: what else a row holds is kept.

    Raises:
        UsageError: no such file, no text, no questions, a line that is none, an unknown kind or role.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read", expected="questions, one a line", received=error.strerror) from error
    rows = []
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number} is no text", expected="UTF-8", received=error.reason) from error
        if line:
            row = json_row(path, number, line) if path.suffix == ".jsonl" else {"question": line}
            rows.append({"id": row.pop("id", number), **checked(path, number, row)})
    if not rows:
        raise UsageError(f"{path} holds no questions", expected="one or more", received="an empty file")
    return rows


def json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}:{number} is not JSON", expected='{"question": ...}', received=str(error)) from error
    if not isinstance(row, dict) or "question" not in row:
        raise UsageError(f"{path}:{number} has no question", expected='{"question": ...}', received=line[:80])
    return row


def checked(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    question = row["question"]
    turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise UsageError(
                f"{path}:{number}: a turn is no turn", expected='{"role": "user", "content": text}', received=turn
            )
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise UsageError(f"{path}:{number} asks nothing", expected="a question at the end", received=question)
    kind = row.get("kind")
    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"{path}:{number}: unknown kind", expected=", ".join(KINDS), received=kind,
            hint=did_you_mean(str(kind), KINDS),
        )  # fmt: skip
    return row
