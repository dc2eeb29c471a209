# SPDX-License-Identifier: Apache-2.0
"""Generation of chains: the steps' state machine inside transformers' own `generate`.

Paper     : MoTE (ACL 2025, arXiv 2405.00557): a start token brings its step's expert in; adaptive and fixed length.
Equation  : the step of a token is that of the last start token up to it, the token itself included
Shapes    : B questions, padded to the left; step ids (B, T) of the tokens that are fed.
Differs   : illegal transitions are masked and every step has a budget, so that every chain ends with an answer.
Check     : cached decoding is the full forward, rows are independent of their batch, chains always end
            (tests/specialize/mote/test_generate.py)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError, UsageError
from anabranch.mixture.context import Context, route
from anabranch.specialize.mote.mote import MoTE
from anabranch.specialize.mote.steps import Budget, StepTokens, allowed, chain_of, ids_of_tokens

BUDGET = {"analysis": 128, "guidance": 128}
ANSWER_BUDGET = 256


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What was generated for one question."""

    texts: dict[str, str]
    """By step, in order; the answer is the last."""
    tokens: list[int]
    forced: tuple[str, ...] = ()
    """Steps whose budget was used up."""
    spent: dict[str, int] = field(default_factory=dict)
    """Tokens by step, those around it counted."""

    @property
    def answer(self) -> str:
        return next(reversed(self.texts.values()), "")


class LegalSteps:
    """Logits processor: what may not follow is out of the question. Reads nothing but the row's tokens."""

    def __init__(self, known: StepTokens, prompt_length: int, chain: Sequence[str] | None, budget: Budget, end_id: int):
        self.known, self.prompt_length, self.end_id = known, prompt_length, end_id
        self.chain, self.budget = chain, budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):  # what is forced would be written all the same
            raise AnabranchError(
                "the model's scores are no numbers", expected="finite weights", hint="a wider precision"
            )
        for row, tokens in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.known.ends[-1] in tokens:
                legal: list[int] | None = [self.end_id]
            else:
                legal = allowed(tokens, self.known, self.chain, self.budget)
            if legal is None:
                current = next(token for token in reversed(tokens) if token in self.known.starts)
                own = self.known.ends[self.known.starts.index(current)]
                others = [token for token in (*self.known.ids, self.end_id) if token != own]
                scores[row, others] = -torch.inf
            else:
                kept = scores[row, legal].clone()
                scores[row] = -torch.inf
                # what is forced may have been impossible to the processors before this one
                scores[row, legal] = torch.where(torch.isfinite(kept), kept, torch.zeros_like(kept))
        return scores


@contextmanager
def following(mote: MoTE, prompt_length: int, num_rows: int) -> Iterator[None]:
    """Within the `with`, a forward of the language model's `generate` knows the step of every token that it is fed.

    `prepare_inputs_for_generation` sees the whole rows, in the order that beam search left them in.
    """
    model = mote.model.get_base_model()
    ids: dict[str, Tensor] = {"step": torch.zeros(num_rows, dtype=torch.long)}
    prepare = model.prepare_inputs_for_generation

    def prepared(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        fed = inputs["input_ids"].shape[1]
        steps = ids_of_tokens(input_ids, mote.tokens, prompt_length)
        for name, known in mote.context_ids(input_ids, steps).items():
            ids[name] = known if known.ndim == 1 else known[:, -fed:]
        return inputs

    model.prepare_inputs_for_generation = prepared
    try:
        with route(mote.model, Context(ids=ids)):
            yield
    finally:
        del model.prepare_inputs_for_generation


@torch.no_grad()
def generate(
    mote: MoTE,
    prompts: Sequence[Sequence[int]],
    *,
    mode: str = "adaptive",
    budget: Mapping[str, int] | None = None,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Chain]:
    """A chain for every question, given as token ids (`collate.question_ids`); greedy at temperature 0.

    mode      adaptive, direct, short (analysis, answer), full, or names with commas.

    Raises:
        UsageError: no questions, a mode that goes back, or a budget of a step that there is not.
    """
    steps, tokenizer = mote.settings.steps, mote.tokenizer
    chain = chain_of(mode, steps)
    limits = {name: BUDGET.get(name, ANSWER_BUDGET) for name in steps.names} | dict(budget or {})
    for name in limits:
        steps.index(name)
    ids, valid = left_padded(prompts, pad_of(tokenizer))
    length, device = ids.shape[1], next(mote.parameters()).device
    end = mote.tokens.ends[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    walked = steps.names if chain is None else chain
    rule = LegalSteps(mote.tokens, length, chain, Budget(of=limits), end)
    was_training = mote.training
    mote.eval()
    try:
        with following(mote, length, len(prompts)), torch.random.fork_rng():
            torch.manual_seed(seed)
            out = mote.model.get_base_model().generate(
                input_ids=ids.to(device), attention_mask=valid.to(device), logits_processor=[rule],
                max_new_tokens=sum(limits[name] + 2 for name in walked), num_beams=num_beams,
                eos_token_id=[mote.tokens.ends[-1], end], pad_token_id=pad_of(tokenizer),
                **sampling(temperature, top_p),
            )  # fmt: skip
    finally:
        mote.train(was_training)
    return [read_chain(row[length:].tolist(), mote.tokens, tokenizer, limits) for row in out]


@torch.no_grad()
def plain_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = ANSWER_BUDGET,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Chain]:
    """What a model without experts answers, as chains of that one step."""
    ids, valid = left_padded(prompts, pad_of(tokenizer))
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device), attention_mask=valid.to(device), max_new_tokens=max_new_tokens,
            num_beams=num_beams, pad_token_id=pad_of(tokenizer), **sampling(temperature, top_p),
        )  # fmt: skip
    chains = []
    for row in out[:, ids.shape[1] :].tolist():
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
        forced = () if tokenizer.eos_token_id in row else ("answer",)
        chains.append(Chain(texts={"answer": text}, tokens=row[:length], forced=forced, spent={"answer": length}))
    return chains


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids and what of them is no padding."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("nothing is asked", expected="at least one question", received=len(prompts))
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    valid = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(list(prompt))
        valid[row, length - len(prompt) :] = 1
    return ids, valid


def pad_of(tokenizer: Any) -> int:
    pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Greedy at temperature 0, whatever the checkpoint's own generation settings say."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def read_chain(tokens: Sequence[int], known: StepTokens, tokenizer: Any, limits: Mapping[str, int]) -> Chain:
    """What was generated, taken apart at the tokens of the steps."""
    texts: dict[str, list[int]] = {}
    current: str | None = None
    spent: dict[str, int] = {}
    kept: list[int] = []
    for token in tokens:
        kept.append(token)
        if token in known.starts:
            current = known.steps.names[known.starts.index(token)]
            texts[current], spent[current] = [], 1
        elif current is not None:
            spent[current] += 1
            if token in known.ends:
                if current == known.steps.answer:
                    break
                current = None
            else:
                texts[current].append(token)
    forced = tuple(name for name, text in texts.items() if len(text) >= limits[name])
    decoded = {name: tokenizer.decode(text, skip_special_tokens=True).strip() for name, text in texts.items()}
    return Chain(texts=decoded, tokens=kept, forced=forced, spent=spent)
