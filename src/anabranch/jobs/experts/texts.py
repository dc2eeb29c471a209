# SPDX-License-Identifier: Apache-2.0
"""Labelled texts as windows of tokens: what a profile reads, and what losses are measured on.

Shapes    : W windows of a label, S tokens; the last one of a document may be shorter and is padded.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS, text_of
from anabranch.errors import UsageError, did_you_mean

SHIPPED = "domain:"


@dataclass(frozen=True, eq=False)
class Windows:
    """One label's windows, in the order of its text."""

    label: str
    input_ids: Tensor  # (W, S)
    attention_mask: Tensor  # (W, S)

    def folds(self, num_folds: int) -> Tensor:
        """(W,): neighbours share a fold, so that resampled folds are nearly independent."""
        return torch.arange(len(self.input_ids)) * num_folds // len(self.input_ids)


def read_windows(
    data: Sequence[str], tokenizer: Any, *, length: int, limit: int, least: int = 1, part: str = "test"
) -> list[Windows]:
    """From name=FILE, once for every label.

    Raises:
        UsageError: nothing given, no name, a name or a text twice, no such file, no text, too little of it.
    """
    if not data:
        raise UsageError("no texts are given", expected="--data name=FILE", hint=f"--data law={SHIPPED}law")
    found: list[Windows] = []
    seen: dict[str, str] = {}
    for given in data:
        label, equals, source = given.partition("=")
        if not equals or not label or not source:
            raise UsageError(f"--data {given} names no text", expected="name=FILE", received=given)
        if label in seen.values():
            raise UsageError(
                f"the label {label} is there twice", expected="another name for every text", received=given
            )
        documents = read_documents(source, part)
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        if digest in seen:
            raise UsageError(
                f"{label} and {seen[digest]} are the same text", expected="a text of its own for every label",
                received=source, hint="a label that stands for another is a mislabelled comparison",
            )  # fmt: skip
        seen[digest] = label
        found.append(cut(label, documents, tokenizer, length, limit, least))
    return found


def read_documents(source: str, part: str) -> list[str]:
    if source.startswith(SHIPPED):
        name = source.removeprefix(SHIPPED)
        if name not in DOMAINS:
            raise UsageError(f"there is no shipped text {name!r}", hint=did_you_mean(name, DOMAINS))
        return [text_of(name, part)]  # type: ignore[arg-type]
    path = Path(source)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        hint = f"{SHIPPED}{DOMAINS[0]} is a text that ships" if ":" in source else None
        raise UsageError(f"{path} cannot be read", expected="a text", received=error.strerror, hint=hint) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no UTF-8", expected="UTF-8", received=f"byte {error.object[error.start]:#x} at {error.start}",
            hint="iconv -f latin1 -t utf-8, if it is Latin-1",
        ) from None  # fmt: skip
    documents = rows_of(path, text) if path.suffix == ".jsonl" else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError(f"{path} holds no text", expected="one document or more", received="nothing")
    return documents


def rows_of(path: Path, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number} is not JSON", expected='{"text": ...}', received=str(error)) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UsageError(f"{path}:{number} has no text", expected='{"text": ...}', received=line[:80])
        found.append(row["text"])
    return found


def cut(label: str, documents: Sequence[str], tokenizer: Any, length: int, limit: int, least: int) -> Windows:
    """At most `limit` windows, spread evenly; none runs from one document into the next."""
    pieces: list[list[int]] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if len(pieces) < least:
        raise UsageError(
            f"{label} has too little text", expected=f"at least {least} windows of {length} tokens",
            received=len(pieces), hint="more text, a smaller length, or fewer folds",
        )  # fmt: skip
    if len(pieces) > limit:
        pieces = [pieces[i * len(pieces) // limit] for i in range(limit)]
    ids = torch.full((len(pieces), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros(len(pieces), length, dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)], mask[row, : len(piece)] = torch.tensor(piece), 1
    return Windows(label, ids, mask)


def halves(texts: Sequence[Windows]) -> tuple[list[Windows], list[Windows]]:
    """To compute from, and to ask: the first and the second half of every text's windows.

    Raises:
        UsageError: a text of a single window.
    """
    parts: tuple[list[Windows], list[Windows]] = ([], [])
    for one in texts:
        middle = len(one.input_ids) // 2
        if not middle:
            raise UsageError(f"{one.label} has too little text", expected="at least 2 windows", received=1)
        for part, rows in zip(parts, (slice(0, middle), slice(middle, None)), strict=True):
            part.append(Windows(one.label, one.input_ids[rows], one.attention_mask[rows]))
    return parts


def batches_of(texts: Sequence[Windows], target: Sequence[str]) -> list[dict[str, Tensor]]:
    """The targets' windows, a batch a label; all labels where no target is named."""
    if missing := sorted(set(target) - {windows.label for windows in texts}):
        raise UsageError("a target has no text", expected=f"--data {missing[0]}=FILE", received=missing[0])
    own = [windows for windows in texts if not target or windows.label in target]
    return [{"input_ids": one.input_ids, "attention_mask": one.attention_mask} for one in own]


@torch.no_grad()
def losses_of(model: Any, windows: Windows, batch_size: int = 32) -> Tensor:
    """(W,) nats a token, of every window by itself."""
    found = []
    for start in range(0, len(windows.input_ids), batch_size):
        ids, mask = (part[start : start + batch_size] for part in (windows.input_ids, windows.attention_mask))
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found.append(((nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).double().cpu())
    return torch.cat(found)
