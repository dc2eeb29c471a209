# SPDX-License-Identifier: Apache-2.0
"""The steps of a chain: what they are called, which tokens belong to which, and what may follow what.

Shapes    : B rows of T tokens; step ids (B, T): 0 .. S - 1 inside a step, QUESTION before the first and in padding.

A step is its start token, its text and its end token. Everything here is a function of the tokens: nothing is
remembered between calls, so beams may be reordered and batches mixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.mixture.lora import EVERYBODY, NOBODY

QUESTION = -3
"""Of the question, of earlier turns and of padding, until `for_experts` says who reads them."""
Policy = Literal["random", "first", "shared_only", "mean"]
POLICIES = ("random", "first", "shared_only", "mean")


class Span(NamedTuple):
    step: str
    start: int
    stop: int


@dataclass(frozen=True)
class Steps:
    """Names in their order, the tokens around each; the last step is the answer, which every chain ends with."""

    names: tuple[str, ...] = ("analysis", "guidance", "answer")
    starts: tuple[str, ...] = ("<|analysis|>", "<|guidance|>", "<|response|>")
    ends: tuple[str, ...] = ("<|/analysis|>", "<|/guidance|>", "<|/response|>")

    def __post_init__(self):
        tokens = (*self.starts, *self.ends)
        if not self.names or not len(self.names) == len(self.starts) == len(self.ends):
            raise UsageError("steps need a name, a start and an end each", received=f"{self.names}, {tokens}")
        if len(set(self.names)) != len(self.names) or len(set(tokens)) != len(tokens):
            raise UsageError("names and tokens of steps have to differ", received=f"{self.names}, {tokens}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def answer(self) -> str:
        return self.names[-1]

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.starts, *self.ends)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise UsageError(
                f"there is no step {name!r}", expected=", ".join(self.names), hint=did_you_mean(name, self.names)
            )
        return self.names.index(name)


@dataclass(frozen=True)
class StepTokens:
    """The ids of the tokens around the steps in one tokenizer."""

    steps: Steps
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.starts, *self.ends)


def step_tokens(tokenizer: Any, steps: Steps) -> StepTokens:
    """
    Raises:
        UsageError: a token around a step is not one token of this tokenizer.
    """
    found = []
    for token in steps.tokens:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UsageError(
                f"{token!r} is not one token of this tokenizer",
                expected="a single id that no text is spelt with",
                received=f"{len(ids)} ids" if len(ids) != 1 else "the unknown token",
                hint="tokenizer.add_special_tokens and model.resize_token_embeddings, as add_step_tokens does",
            )
        found.append(ids[0])
    return StepTokens(steps, tuple(found[: len(steps)]), tuple(found[len(steps) :]))


def add_step_tokens(model: Any, tokenizer: Any, steps: Steps) -> StepTokens:
    """The steps' tokens in tokenizer and model; those that are there already are kept. New rows start at the mean.

    Raises:
        UsageError: some of the tokens are known and others not: they may mean something else.
    """
    known = [token for token in steps.tokens if token in tokenizer.get_vocab()]
    if known and len(known) < len(steps.tokens):
        raise UsageError(
            f"{known[0]!r} is already in the vocabulary, but not all tokens of the steps are",
            expected="all or none",
            received=f"{len(known)} of {len(steps.tokens)}",
            hint="other names for the tokens",
        )
    if not known:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(steps.tokens)}, replace_extra_special_tokens=False
        )
    size = len(tokenizer)
    if size > model.get_input_embeddings().num_embeddings:
        old = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
                if table is not None:
                    table.weight[old:] = table.weight[:old].mean(0)
    return step_tokens(tokenizer, steps)


# tokens -> steps -----------------------------------------------------------------------------------------------------


def check_spans(spans: Sequence[Span], length: int, steps: Steps, row: int = 0) -> None:
    """
    Raises:
        UsageError: an unknown step, spans that overlap, are empty, stand in another order or leave the row; no answer.
    """

    def wrong(what: str, span: Span | None = None) -> UsageError:
        received = str(span) if span is not None else ", ".join(step for step, *_ in spans) or "no steps"
        expected = f"steps in order within {length} tokens, the last of them {steps.answer}"
        return UsageError(f"row {row}: {what}", expected=expected, received=received)

    at, order = 0, -1
    for span in (Span(*values) for values in spans):
        number = steps.index(span.step)
        if span.stop - span.start < 2:
            raise wrong("a step has no tokens", span)
        if span.start < at:
            raise wrong("spans overlap", span)
        if span.stop > length:
            raise wrong("a span leaves its row", span)
        if number <= order:
            raise wrong("steps stand in another order", span)
        at, order = span.stop, number
    if order != len(steps) - 1:
        raise wrong("a row has no answer")


def ids_of_spans(spans: Sequence[Span], length: int, steps: Steps) -> Tensor:
    """(T,): the step of each token, QUESTION outside."""
    ids = torch.full((length,), QUESTION)
    for step, start, stop in spans:
        ids[start:stop] = steps.index(step)
    return ids


def ids_of_tokens(tokens: Tensor, known: StepTokens, prompt_length: int) -> Tensor:
    """(B, T): the step of each token of a running generation; a start token counts to its own step.

    What stands in the prompt is question, whatever it looks like.
    """
    length = tokens.shape[1]
    number = torch.full_like(tokens, -1)
    for step, start in enumerate(known.starts):
        number[tokens == start] = step
    number[:, :prompt_length] = -1
    place = torch.where(number >= 0, torch.arange(length, device=tokens.device), -1).cummax(dim=1).values
    steps = number.gather(1, place.clamp(min=0))
    return torch.where(place >= 0, steps, QUESTION)


def for_experts(step_ids: Tensor, policy: Policy, num_steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Step ids with the question's tokens given to somebody: an expert drawn for each row, the first one, the shared
    one alone, or the mean of all.

    Raises:
        UsageError: policy random without a generator.
    """
    if policy == "random":
        if generator is None:
            raise UsageError("a random reader of the question needs a generator", hint="policy first when not training")
        reader = torch.randint(num_steps, (len(step_ids), 1), generator=generator).to(step_ids)
    else:
        known = {"first": 0, "shared_only": NOBODY, "mean": EVERYBODY}
        if policy not in known:
            raise UsageError(f"nobody reads questions as {policy!r}", hint=did_you_mean(policy, POLICIES))
        reader = step_ids.new_full((len(step_ids), 1), known[policy])
    return torch.where(step_ids == QUESTION, reader, step_ids)


# what may follow -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Tokens of text a step may have; where it is used up the end token is forced."""

    of: Mapping[str, int]

    def __post_init__(self):
        if wrong := {name: value for name, value in self.of.items() if value < 1}:
            raise UsageError("a step needs room for a token", expected="at least 1", received=wrong)


def allowed(row: Sequence[int], known: StepTokens, chain: Sequence[str] | None, budget: Budget) -> list[int] | None:
    """Tokens that may come next after what was generated so far; None: any text, or the end of the running step.

    chain    steps that have to be walked, in order; None: the model chooses, never going back.
    """
    steps = known.steps
    start = next((i for i in range(len(row) - 1, -1, -1) if row[i] in known.starts), None)
    if start is None:
        return [known.starts[i] for i in following(-1, steps, chain)]
    current = known.starts.index(row[start])
    if known.ends[current] in row[start:]:
        return [known.starts[i] for i in following(current, steps, chain)]
    if len(row) - start - 1 >= budget.of[steps.names[current]]:
        return [known.ends[current]]
    return None


def following(current: int, steps: Steps, chain: Sequence[str] | None) -> list[int]:
    """Steps that may begin after this one ended (-1: none has begun)."""
    later = range(current + 1, len(steps))
    if chain is None:
        return list(later)
    wanted = [steps.index(name) for name in chain]
    return [next(number for number in wanted if number > current)] if any(n > current for n in wanted) else []


MODES: dict[str, tuple[str, ...] | None] = {
    "adaptive": None,
    "direct": ("answer",),
    "short": ("analysis", "answer"),
    "full": ("analysis", "guidance", "answer"),
}
"""What has to be walked; `adaptive` is the model's own choice."""


def chain_of(mode: str, steps: Steps) -> tuple[str, ...] | None:
    """Steps of a mode; a mode may also name them, as `analysis,answer`."""
    if mode == "adaptive":
        return None
    if mode in MODES and steps.names == Steps().names:
        return MODES[mode]
    if mode in ("direct", "full"):
        return steps.names if mode == "full" else (steps.answer,)
    chain = tuple(name.strip() for name in mode.split(","))
    numbers = [steps.index(name) for name in chain]
    if numbers != sorted(set(numbers)) or chain[-1] != steps.answer:
        raise UsageError(
            "a chain goes forward and ends with the answer", expected=f"such as {','.join(steps.names)}", received=mode
        )
    return chain
