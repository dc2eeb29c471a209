# SPDX-License-Identifier: Apache-2.0
"""Chains as rows of tokens, and rows as batches: step ids, labels, and masks where steps are skipped.

Shapes    : a row {"input_ids": T ints, "step_spans": [(step, start, stop), ...]}; a batch of B rows padded to one T.

Spans come from the structure when a chain is tokenised, never from reading the text again. The question has no labels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.errors import UsageError
from anabranch.specialize.mote.skip import Skip, attention, draw_blocks, positions
from anabranch.specialize.mote.steps import QUESTION, Policy, Span, StepTokens, check_spans, for_experts, ids_of_spans

IGNORED = -100
"""Label of tokens that count in no loss."""


class Row(NamedTuple):
    input_ids: list[int]
    step_spans: list[Span]


def question_ids(tokenizer: Any, question: str | Sequence[Mapping[str, str]]) -> list[int]:
    """A question, or a conversation that ends with one, as the model's chat template puts it; plain without a template.

    Raises:
        UsageError: nothing is asked, or the text holds tokens of steps, which would be read as steps.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    if not messages or not str(messages[-1].get("content", "")).strip():
        raise UsageError("nothing is asked", expected="a question", received=question)
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)
    text = "\n".join(str(message["content"]) for message in messages)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def chain_row(
    tokenizer: Any, tokens: StepTokens, question: str | Sequence[Mapping[str, str]], chain: Mapping[str, str]
) -> Row:
    """question, then start token, text, end token of each step of the chain, then the end of the row.

    Raises:
        UsageError: an unknown step, one without text, or no answer.
    """
    steps, spans = tokens.steps, []
    ids = question_ids(tokenizer, question)
    if found := set(ids) & set(tokens.ids):
        raise UsageError("the question holds a token of a step", received=tokenizer.decode(sorted(found)))
    for name in sorted(chain, key=steps.index):
        text = tokenizer(chain[name].strip(), add_special_tokens=False).input_ids
        if not text:
            raise UsageError(
                f"the step {name} has no text", expected="some text, or no such step", received=chain[name]
            )
        number, start = steps.index(name), len(ids)
        ids += [tokens.starts[number], *text, tokens.ends[number]]
        spans.append(Span(name, start, len(ids)))
    if tokenizer.eos_token_id is not None and spans:
        ids.append(tokenizer.eos_token_id)
        spans[-1] = spans[-1]._replace(stop=len(ids))
    check_spans(spans, len(ids), steps)
    return Row(ids, spans)


PACKED = ("seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")
"""What rows carry in which several texts stand behind one another."""


def refuse_packed(rows: Sequence[Any]) -> None:
    """
    Raises:
        UsageError: a row in which several texts are packed: a step of one could read the steps of another.
    """
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and (signs := [name for name in PACKED if name in row]):
            raise UsageError(
                f"row {number} is packed", expected="one chain a row, input_ids and step_spans",
                received=f"{signs[0]} beside them", hint="packing=False, padding_free=False",
            )  # fmt: skip


def fitting(rows: Iterable[Row], max_length: int) -> tuple[list[Row], int]:
    """Rows that fit, and how many do not: a chain that is cut has lost its answer, so it is no chain."""
    rows = list(rows)
    kept = [row for row in rows if len(row.input_ids) <= max_length]
    return kept, len(rows) - len(kept)


@dataclass
class StepSpanCollator:
    """Callable on a list of rows, as Trainer wants it."""

    tokens: StepTokens
    pad_id: int
    skip: Skip | None = None
    question: Policy | None = "random"
    """Who reads the question: drawn here, so that a batch is a function of its seed; None leaves it to the model."""
    side: str = "right"
    seed: int = 0
    calls: int = 0
    additive: bool = False
    """A mask of 0 and -inf in place of booleans, for eager attention."""

    def __post_init__(self):
        if self.side not in ("left", "right"):
            raise UsageError("padding goes to a side", expected="left or right", received=self.side)

    def __call__(self, rows: Sequence[Row | Mapping[str, Any]]) -> dict[str, Tensor]:
        self.calls += 1
        generator = torch.Generator().manual_seed(derived_seed("skipping", self.seed, self.calls))
        return self.collate(rows, generator)

    def collate(self, rows: Sequence[Row | Mapping[str, Any]], generator: torch.Generator) -> dict[str, Tensor]:
        refuse_packed(rows)
        found = [row if isinstance(row, Row) else Row(list(row["input_ids"]), list(row["step_spans"])) for row in rows]
        for number, row in enumerate(found):
            check_spans(row.step_spans, len(row.input_ids), self.tokens.steps, number)
        length = max(len(row.input_ids) for row in found)
        batch = {
            "input_ids": torch.full((len(found), length), self.pad_id),
            "attention_mask": torch.zeros(len(found), length, dtype=torch.long),
            "step_ids": torch.full((len(found), length), QUESTION),
        }
        for number, row in enumerate(found):
            size = len(row.input_ids)
            place = slice(length - size, length) if self.side == "left" else slice(0, size)
            batch["input_ids"][number, place] = torch.tensor(row.input_ids)
            batch["attention_mask"][number, place] = 1
            batch["step_ids"][number, place] = ids_of_spans(row.step_spans, size, self.tokens.steps)
        batch["labels"] = torch.where(batch["step_ids"] >= 0, batch["input_ids"], IGNORED)
        if self.skip is not None and self.skip.mode != "none":
            batch |= self.skipped(batch["step_ids"], batch["attention_mask"], generator)
        if self.question is not None:
            batch["step_ids"] = for_experts(batch["step_ids"], self.question, len(self.tokens.steps), generator)
        return batch

    def skipped(self, step_ids: Tensor, valid: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert self.skip is not None
        mask = attention(step_ids, valid, draw_blocks(step_ids, len(self.tokens.steps), self.skip, generator))
        if self.skip.mode == "transitive" and self.skip.reposition:
            places = positions(mask, valid)
        else:
            places = (valid.cumsum(-1) - 1).clamp(min=0)
        if self.additive:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return {"attention_mask": mask, "position_ids": places}


class ChainBatches:
    """Stream of the training loop: rows in a shuffled order, a pure function of (seed, step)."""

    def __init__(self, rows: Sequence[Row], collator: StepSpanCollator, batch_size: int, *, seed: int):
        if not rows:
            raise UsageError("there are no chains to train on", expected="at least one", received=0)
        self.rows, self.collator, self.seed = rows, collator, seed
        self.indices = ShuffledIndices(len(rows), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("skipping", self.seed, step))
        return self.collator.collate([self.rows[i] for i in self.indices.at(step).tolist()], generator)
