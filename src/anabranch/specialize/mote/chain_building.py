# SPDX-License-Identifier: Apache-2.0
"""Chains that a model writes itself: it answers directly where that passes its own check, else it thinks first.

Paper     : MoTE (ACL 2025, arXiv 2405.00557): chains as long as their question needs.
Equation  : y ~ p(y given x), else a ~ p(a given x), y ~ p(y given a, x), else g ~ p(g given a, x),
            y ~ p(y given g, a, x); the chain ends with the first y of c(x, y) = P(yes) / (P(yes) + P(no)) >= threshold
Shapes    : N questions, worked on together: only those without a passing answer go on to the next step.
Differs   : what the paper leaves open: the last answer is tried again, then the question is dropped; so is one whose
            analysis or guidance stays empty. An empty answer fails without a check. A draft may be told to take every
            step, needed or not: else notes are only ever seen before answers to harmful questions, and become a sign.
Check     : every path and the order of the calls, on a scripted writer (tests/specialize/mote/test_chain_building.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

NOTES = ("analysis", "guidance")
ANSWER = "answer"
DIRECT = "direct"


class Written(NamedTuple):
    text: str
    num_tokens: int
    cut: bool
    """The budget was used up before the text ended."""


class Verdict(NamedTuple):
    probability: float
    """Of yes, harmless, against no."""
    mass: float
    """Of both words together, among all words."""
    own: float | None = None
    """What the model itself said, where another judge decided."""


@dataclass
class Draft:
    """A question and what was written for it so far."""

    id: str | int
    question: str | Sequence[Mapping[str, str]]
    texts: dict[str, str] = field(default_factory=dict)
    """By step; the answer is the latest one, passed or not."""
    spent: dict[str, int] = field(default_factory=dict)
    """Tokens by step."""
    cut: list[str] = field(default_factory=list)
    """Steps whose budget was used up."""
    verdicts: list[tuple[str, Verdict | None]] = field(default_factory=list)
    """(stage, verdict) of every answer; None: it was empty, and nobody was asked."""
    passed: bool = False
    dropped: str = ""
    """Why: check, empty or too_long."""
    all_steps: bool = False
    """No answer is tried before every note is there."""


class Writer(Protocol):
    def write(self, step: str, draw: str, drafts: Sequence[Draft]) -> list[Written]:
        """The step's text of every draft from what it has so far; `draw` names the throw of the dice."""

    def check(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """The model's own judgement of question and answer, nothing else."""


def build_chains(drafts: Sequence[Draft], writer: Writer, *, retries: int = 2, threshold: float = 0.5) -> None:
    """Fills the drafts up; afterwards each of them has passed or is dropped."""
    pending = [draft for draft in drafts if not draft.dropped]
    pending = answer_early(pending, writer, DIRECT, threshold)
    for step in NOTES[:-1]:
        pending = take_note(pending, writer, step, retries)
        pending = answer_early(pending, writer, step, threshold)
    pending = take_note(pending, writer, NOTES[-1], retries)
    pending = answer(pending, writer, NOTES[-1], threshold)
    for retry in range(1, retries + 1):
        pending = answer(pending, writer, f"retry {retry}", threshold)
    for draft in pending:
        draft.dropped = "check" if draft.texts[ANSWER] else "empty"


def answer_early(drafts: Sequence[Draft], writer: Writer, stage: str, threshold: float) -> list[Draft]:
    """`answer` for those that may end here; returns all that go on."""
    answer([draft for draft in drafts if not draft.all_steps], writer, stage, threshold)
    return [draft for draft in drafts if not draft.passed]


def answer(drafts: Sequence[Draft], writer: Writer, stage: str, threshold: float) -> list[Draft]:
    """y ~ p(y given what there is), c(x, y); returns those that did not pass."""
    put(drafts, writer, ANSWER, stage)
    told = [draft for draft in drafts if draft.texts[ANSWER]]
    verdicts = {id(draft): verdict for draft, verdict in zip(told, writer.check(told) if told else [], strict=True)}
    for draft in drafts:
        verdict = verdicts.get(id(draft))
        draft.verdicts.append((stage, verdict))
        draft.passed = verdict is not None and verdict.probability >= threshold
    return [draft for draft in drafts if not draft.passed]


def take_note(drafts: Sequence[Draft], writer: Writer, step: str, retries: int) -> list[Draft]:
    """a ~ p(a given x), g ~ p(g given a, x); returns those that have one."""
    waiting = list(drafts)
    for again in range(retries + 1):
        put(waiting, writer, step, f"note {again}")
        waiting = [draft for draft in waiting if not draft.texts[step]]
    for draft in waiting:
        draft.dropped = "empty"
    return [draft for draft in drafts if not draft.dropped]


def put(drafts: Sequence[Draft], writer: Writer, step: str, draw: str) -> None:
    if not drafts:
        return
    for draft, written in zip(drafts, writer.write(step, draw, drafts), strict=True):
        draft.texts[step], draft.spent[step] = written.text, written.num_tokens
        draft.cut = [name for name in draft.cut if name != step] + [step] * written.cut
