# SPDX-License-Identifier: Apache-2.0
"""Chains that a model writes itself: no more steps than it needs to give an answer that it finds harmless.

Paper     : MoTE (ACL 2025, arXiv 2405.00557), adaptive construction of self-generated chains.
Equation  : answer | x;  if the check fails  analysis | x, answer | analysis, x;  if it fails again
            guidance | analysis, x,  answer | guidance, analysis, x;  kept when check(answer, x) passes
Shapes    : a batch of questions goes through the stages together; those that pass leave it.
Differs   : wording, temperature and what happens to a chain that never passes are not given: the last answer is drawn
            again `retries` times, then the question is dropped and counted. The check compares the chances of yes and
            no, so that nothing has to be read out of free text; it is the model judging itself.
Check     : every path through the stages with a scripted writer (tests/specialize/mote/test_chains.py)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import exp, log
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError, did_you_mean
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import left_padded, pad_of, sampling

Conversation = list[dict[str, str]]
STAGES = ("direct", "analysis", "guidance")
"""What an answer may lean on; the last two are the chain's steps before it."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What the last turn of a conversation is put as; {question}, {analysis}, {guidance}, {answer} are filled in."""

    direct: str = "{question}"
    write_analysis: str = (
        "Question: {question}\n\nDo not answer it. Say in a few sentences what is asked for, what it could be used "
        "for, and what in it is dangerous, illegal, hateful, deceptive or private, openly or between the lines."
    )
    after_analysis: str = (
        "Question: {question}\n\nAnalysis: {analysis}\n\nAnswer the question with the analysis in mind. Be useful, and "
        "do no harm."
    )
    write_guidance: str = (
        "Question: {question}\n\nAnalysis: {analysis}\n\nDo not answer yet. Say in a few sentences how a good answer "
        "should be built: what it should leave out, and what safe and useful help it can give."
    )
    after_guidance: str = (
        "Question: {question}\n\nAnalysis: {analysis}\n\nGuidance: {guidance}\n\nAnswer the question. Follow the "
        "guidance."
    )
    check: str = (
        "Question: {question}\n\nAnswer: {answer}\n\nIs this answer harmless, so that nobody could come to harm "
        "through it? Say yes or no."
    )
    yes: tuple[str, ...] = ("yes", "Yes", " yes", " Yes")
    no: tuple[str, ...] = ("no", "No", " no", " No")


def prompts_from(values: Mapping[str, Any]) -> Prompts:
    """
    Raises:
        UsageError: a prompt that there is not, or one that leaves out what it is about.
    """
    known = {f.name for f in fields(Prompts)}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"there is no prompt {name!r}", hint=did_you_mean(name, known))
        about = "{answer}" if name == "check" else "{question}"
        if name not in ("yes", "no") and about not in str(value):
            raise UsageError(f"the prompt {name!r} leaves out {about}", received=value)
    return Prompts(**{name: tuple(value) if name in ("yes", "no") else str(value) for name, value in values.items()})


class Writer(Protocol):
    """A language model as the construction sees it."""

    def write(self, conversations: Sequence[Conversation], purpose: str, tag: str) -> list[str]:
        """A text for each; `purpose` is answer, analysis or guidance, `tag` decides the draw."""
        ...

    def approve(self, conversations: Sequence[Conversation]) -> list[float]:
        """The chance of yes over yes and no."""
        ...


@dataclass(kw_only=True)
class Draft:
    """A question on its way."""

    conversation: Conversation
    chain: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    check: float = 0.0
    passed: str | None = None
    """The stage whose answer was accepted."""
    tries: dict[str, int] = field(default_factory=dict)
    """Answers drawn by stage."""

    def asked(self, template: str) -> Conversation:
        """The conversation with its last turn put as the template says."""
        filled = template
        known = {"question": self.conversation[-1]["content"], "answer": self.answer, **self.chain}
        for name, text in known.items():
            filled = filled.replace("{" + name + "}", text)
        return [*self.conversation[:-1], {"role": "user", "content": filled}]


def build_chains(
    questions: Sequence[str | Conversation],
    writer: Writer,
    prompts: Prompts,
    *,
    tag: str = "",
    retries: int = 2,
    threshold: float = 0.5,
) -> list[Draft]:
    """A draft for each question; `passed` is None where no answer was accepted."""
    drafts = [Draft(conversation=conversation_of(question)) for question in questions]
    for stage in STAGES:
        left = [draft for draft in drafts if draft.passed is None]
        if stage != "direct" and left:
            texts = writer.write([d.asked(getattr(prompts, f"write_{stage}")) for d in left], stage, f"{tag}/{stage}")
            for draft, text in zip(left, texts, strict=True):
                draft.chain[stage] = text
        for attempt in range(1 + retries if stage == STAGES[-1] else 1):
            left = [draft for draft in drafts if draft.passed is None]
            if left:
                answer(left, stage, writer, prompts, f"{tag}/{stage}/answer/{attempt}", threshold)
    return drafts


def answer(left: list[Draft], stage: str, writer: Writer, prompts: Prompts, tag: str, threshold: float) -> None:
    """An answer for each, and the check of it."""
    template = prompts.direct if stage == "direct" else getattr(prompts, f"after_{stage}")
    texts = writer.write([draft.asked(template) for draft in left], "answer", tag)
    for draft, text in zip(left, texts, strict=True):
        draft.answer = text
        draft.tries[stage] = draft.tries.get(stage, 0) + 1
    chances = writer.approve([draft.asked(prompts.check) for draft in left])
    for draft, chance in zip(left, chances, strict=True):
        draft.check = chance
        if chance > threshold and draft.answer.strip() and all(text.strip() for text in draft.chain.values()):
            draft.passed = stage


def conversation_of(question: str | Conversation) -> Conversation:
    return [{"role": "user", "content": question}] if isinstance(question, str) else list(question)


@dataclass(frozen=True, kw_only=True)
class ModelWriter:
    """A causal language model of transformers; batches are generated with its cache."""

    model: Any
    tokenizer: Any
    prompts: Prompts = field(default_factory=Prompts)
    seed: int = 0
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: {"analysis": 96, "guidance": 96, "answer": 192})

    @torch.no_grad()
    def write(self, conversations: Sequence[Conversation], purpose: str, tag: str) -> list[str]:
        ids, valid = self.padded(conversations)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed("chains", self.seed, tag) % 2**63)
            out = self.model.generate(
                input_ids=ids, attention_mask=valid, max_new_tokens=self.max_new_tokens[purpose],
                pad_token_id=pad_of(self.tokenizer), **sampling(self.temperature, self.top_p),
            )  # fmt: skip
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1] :]]

    @torch.no_grad()
    def approve(self, conversations: Sequence[Conversation]) -> list[float]:
        ids, valid = self.padded(conversations)
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=valid, position_ids=places).logits[:, -1].float()
        chances = logits.softmax(-1)
        yes, no = (chances[:, self.first_tokens(words)].sum(-1) for words in (self.prompts.yes, self.prompts.no))
        found: list[float] = (yes / (yes + no)).tolist()
        return found

    def padded(self, conversations: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
        ids, valid = left_padded([question_ids(self.tokenizer, c) for c in conversations], pad_of(self.tokenizer))
        device = next(self.model.parameters()).device
        return ids.to(device), valid.to(device)

    def first_tokens(self, words: Sequence[str]) -> list[int]:
        """The tokens that the words begin with.

        Raises:
            UsageError: none of the words is known to the tokenizer.
        """
        pieces = [self.tokenizer(word, add_special_tokens=False).input_ids for word in words]
        found = sorted({ids[0] for ids in pieces if ids and ids[0] != self.tokenizer.unk_token_id})
        if not found:
            raise UsageError(
                "the model cannot say yes or no", expected="words that its tokenizer knows", received=", ".join(words),
                hint="a --prompts-file with other words for yes and no",
            )  # fmt: skip
        return found


def self_bleu(texts: Sequence[str], most: int = 200) -> float:
    """Mean BLEU-4 of each text against the others, 0 to 100, add-one smoothed; lower is more diverse."""
    few = [text.split() for text in texts[:most] if text.split()]
    if len(few) < 2:
        return 0.0
    return sum(bleu(text, [other for other in few if other is not text]) for text in few) / len(few)


def bleu(text: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """100 x brevity x (prod_n (1 + matched n-grams) / (1 + n-grams))^(1/4), counts clipped at the most in one other."""
    total = 0.0
    for n in range(1, 5):
        own = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
        total += log((1 + sum((own & most).values())) / (1 + sum(own.values()))) / 4
    nearest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
    return 100 * exp(total) * (1.0 if len(text) > nearest else exp(1 - nearest / len(text)))
