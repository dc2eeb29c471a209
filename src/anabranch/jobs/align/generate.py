# SPDX-License-Identifier: Apache-2.0
"""`anabranch align generate` and `align chat`: answers with the experts of their steps, to a file or to a person."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import UsageError
from anabranch.jobs.align.journal import JOURNAL, SEEN, append, finished, line_of, run_of, seen_of
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.settings import ChatSettings, GenerateSettings
from anabranch.jobs.progress import Progress, say
from anabranch.jobs.resumed import fingerprint_of, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.models.language.folder import open_language_model
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.folder import load, read_manifest
from anabranch.specialize.mote.generate import ANSWER_BUDGET, Chain, generate, plain_answers
from anabranch.specialize.mote.mote import MoTE
from anabranch.swap import swap_text
from anabranch.train.publish import digest_of
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

LEAVE = ("", "exit", "quit", ":q")


class Speaker:
    """A mixture, or a base model without experts, which answers directly."""

    def __init__(self, settings: ChatSettings | GenerateSettings):
        model, self.tokenizer = open_language_model(settings.model)
        self.settings, self.model = settings, model
        self.mote: MoTE | None = None
        if settings.experts is not None:
            self.mote = load(model, settings.experts, strict=settings.strict)
            self.tokenizer = self.mote.tokenizer
        elif settings.mode != "adaptive":
            raise UsageError("a model without experts has no steps", expected="--experts", received=settings.mode)

    def answer(self, questions: Sequence[Any]) -> list[Chain]:
        chosen = self.settings
        prompts = [question_ids(self.tokenizer, question) for question in questions]
        if self.mote is None:
            limit = chosen.budget.get("answer", ANSWER_BUDGET)
            return plain_answers(
                self.model, self.tokenizer, prompts, max_new_tokens=limit, num_beams=chosen.beams,
                temperature=chosen.temperature, top_p=chosen.top_p, seed=chosen.seed,
            )  # fmt: skip
        return generate(
            self.mote, prompts, mode=chosen.mode, budget=chosen.budget, num_beams=chosen.beams,
            temperature=chosen.temperature, top_p=chosen.top_p, seed=chosen.seed,
        )  # fmt: skip


def align_generate(settings: GenerateSettings) -> dict[str, Any]:
    """Write settings.out, a row a question; returns how many tokens each step took on average."""
    if settings.batch_size < 1:
        raise UsageError("a batch needs a row", expected="at least 1", received=settings.batch_size)
    if settings.out.is_dir():
        raise UsageError(f"{settings.out} cannot be written", expected="a file, such as answers.jsonl",
                         received="a folder")  # fmt: skip
    questions = read_questions(settings.questions)
    with StopFlag() as stop:
        speaker = Speaker(settings)
        with RunFolder.open(run_of(settings.out), plain_values_of(settings), settings.resume) as run:
            same_as_before(run.path / SEEN, seen(settings, speaker, questions))
            rows = answered(settings, speaker, questions, run.path / JOURNAL, stop)
            swap_text("".join(map(line_of, rows)), settings.out)
        shutil.rmtree(run_of(settings.out))
    spent: dict[str, list[int]] = {}
    for row in rows:
        for step, count in row["tokens"].items():
            spent.setdefault(step, []).append(count)
    facts = {
        "questions": len(questions),
        "tokens": {step: sum(counts) / len(questions) for step, counts in spent.items()},
        "walked": {step: len(counts) for step, counts in spent.items()},
    }
    say(f"{len(questions)} answers; steps taken: " + ", ".join(f"{s} {n}" for s, n in facts["walked"].items()))
    say("tokens a question: " + ", ".join(f"{step} {count:.1f}" for step, count in facts["tokens"].items()))
    say(f"\nanswers  {settings.out}")
    return facts


def seen(settings: GenerateSettings, speaker: Speaker, questions: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a run that goes on has to see again."""
    folder, experts = settings.experts, list[Any]()
    if folder is not None:
        weights = sorted(folder.glob("*/*.safetensors"))
        experts = [read_manifest(folder), *((file.relative_to(folder), digest_of(file).sha256) for file in weights)]
    return seen_of(speaker.model, speaker.tokenizer, questions) | {"experts": fingerprint_of(experts)}


def answered(
    settings: GenerateSettings, speaker: Speaker, questions: Sequence[dict[str, Any]], journal: Path, stop: StopFlag
) -> list[dict[str, Any]]:
    """A row a question, from the journal as far as it goes."""
    rows = finished(journal, [row["id"] for row in questions], settings.batch_size)
    with Progress("align generate", len(questions), len(rows)) as progress:
        for start in range(len(rows), len(questions), settings.batch_size):
            stop.check(f"stopped after {start} of {len(questions)} answers; --resume goes on")
            part = questions[start : start + settings.batch_size]
            chains = speaker.answer([row["question"] for row in part])
            done = [
                {**row, "answer": chain.answer, "chain": chain.texts, "tokens": chain.spent,
                 "budget_used_up": list(chain.forced)}
                for row, chain in zip(part, chains, strict=True)
            ]  # fmt: skip
            append(journal, done)
            rows += done
            for chain in chains:
                progress.advance(f"{len(chain.tokens)} tokens")
    return rows


def align_chat(settings: ChatSettings) -> None:
    """Answer settings.prompt, or line after line of what is typed; earlier turns are part of the next question."""
    speaker = Speaker(settings)
    turns: list[dict[str, str]] = []
    for question in [settings.prompt] if settings.prompt else typed():
        turns.append({"role": "user", "content": question})
        (chain,) = speaker.answer([list(turns)])
        say(shown(chain, settings))
        turns.append({"role": "assistant", "content": chain.answer})


def shown(chain: Chain, settings: ChatSettings) -> str:
    if settings.show == "answer":
        return chain.answer
    width = max(map(len, chain.texts), default=0)
    return "\n".join(f"{step:<{width}}  {text}" for step, text in chain.texts.items())


def typed() -> Iterator[str]:
    if sys.stdin.isatty():
        say("an empty line ends the conversation")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in LEAVE:
            return
        yield line
