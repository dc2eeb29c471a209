# SPDX-License-Identifier: Apache-2.0
"""What commands that write row after row keep beside their file until it is whole: OUT.run, with a journal in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError
from anabranch.jobs.resumed import fingerprint_of
from anabranch.specialize.mote.folder import fingerprint, tokenizer_hash
from anabranch.swap import sync

SEEN, JOURNAL = "seen.json", "journal.jsonl"
LINE_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Escaped in rows: some readers would end a line there."""


def run_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def seen_of(model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a run that goes on has to see again, whatever it writes."""
    return {
        "model": fingerprint(model),
        "tokenizer": fingerprint_of([tokenizer_hash(tokenizer), tokenizer.chat_template]),
        "questions": fingerprint_of(questions),
    }


def append(journal: Path, entries: Sequence[dict[str, Any]]) -> None:
    try:
        with journal.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(line_of(entry) for entry in entries))
        sync(journal)
    except OSError as error:
        raise AnabranchError(
            f"could not write {journal}", received=error.strerror, hint="make room; --resume goes on from there"
        ) from error


def line_of(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    for letter, escaped in LINE_BREAKS.items():
        line = line.replace(letter, escaped)
    return line + "\n"


def finished(journal: Path, names: Sequence[str | int], batch_size: int) -> list[dict[str, Any]]:
    """Whole batches of the journal; what follows them, such as half a line, is taken out of the file."""
    if not journal.is_file():
        return []
    rows, lines = [], journal.read_bytes().split(b"\n")[:-1]
    for line, name in zip(lines, names, strict=False):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or row.get("id") != name:
            break
        rows.append(row)
    if len(rows) < len(names):
        del rows[len(rows) // batch_size * batch_size :]
    with journal.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[: len(rows)]))
    return rows
