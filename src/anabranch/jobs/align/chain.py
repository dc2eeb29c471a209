# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chain`: from questions to the chains that a model writes for them, those that pass its own check.

OUT                 a row a kept question, written once all are done
chain_report.json   beside it: how many passed and where, what was dropped, how alike the texts are
OUT.run/            config.resolved.yaml, and journal.jsonl with every question as it is done: what a stopped build
                    goes on from
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from random import Random
from typing import Any

from anabranch.data.streams import derived_seed
from anabranch.errors import CheckFailed, UsageError, did_you_mean
from anabranch.jobs.align.chain_check import SELF, CheckedBy
from anabranch.jobs.align.chain_report import REPORT, report_of, shape_of, tell
from anabranch.jobs.align.journal import JOURNAL, SEEN, append, finished, line_of, run_of, seen_of
from anabranch.jobs.align.judges import open_judge
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.settings import ChainSettings
from anabranch.jobs.progress import Progress
from anabranch.jobs.resumed import fingerprint_of, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.specialize.mote.chain_building import ANSWER, NOTES, Draft, Writer, build_chains
from anabranch.specialize.mote.chain_prompts import Prompts
from anabranch.specialize.mote.chain_writer import ChainWriter
from anabranch.specialize.mote.generate import ANSWER_BUDGET, BUDGET
from anabranch.specialize.mote.steps import Steps
from anabranch.swap import swap_text
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag


def align_chain(settings: ChainSettings) -> dict[str, Any]:
    """Write settings.out and its report; returns the report."""
    check_settings(settings)
    prompts = read_prompts(settings.prompts_file)
    questions = asked(settings.questions)
    refuse_taken(settings)
    with hushed(), StopFlag() as stop:
        model, tokenizer = open_language_model(settings.model)
        judge = (
            None
            if settings.check == SELF
            else open_judge(settings.check, threshold=settings.threshold, batch_size=settings.batch_size)
        )
        own = ChainWriter(
            model, tokenizer, prompts, budget=budget_of(settings), temperature=settings.temperature,
            top_p=settings.top_p, seed=settings.seed,
            poll=lambda: stop.check("stopped; --resume goes on after the last finished batch"),
        )  # fmt: skip
        writer = own if judge is None else CheckedBy(own, judge, questions)
        too_long = longer_than_context(own, questions)
        with RunFolder.open(run_of(settings.out), plain_values_of(settings), settings.resume) as run:
            made_with = seen_of(model, tokenizer, questions) | {"prompts": fingerprint_of([asdict(prompts)])}
            same_as_before(run.path / SEEN, made_with)
            rows = build(settings, writer, questions, too_long, run.path / JOURNAL)
            made_with |= {"out": settings.out.name, "settings": plain_values_of(settings), "prompts": asdict(prompts)}
            report = report_of(rows, made_with)
            publish(settings.out, questions, rows, report)
    tell(settings, report)
    if not report["all"]["kept"]:
        raise CheckFailed(
            "no chain was kept: the check passed none of the model's answers",
            expected="one or more",
            received=f"none of {len(questions)} questions",
            hint=f"{settings.out.with_name(REPORT)} says where they failed; other prompts, or a more capable model",
        )
    return report


# what is refused


def check_settings(settings: ChainSettings) -> None:
    for name, fine, expected in (
        ("batch_size", settings.batch_size >= 1, "at least 1"),
        ("retries", settings.retries >= 0, "0 or more"),
        ("temperature", 0 <= settings.temperature < float("inf"), "a number from 0"),
        ("top_p", 0 < settings.top_p <= 1, "a share above 0, up to 1"),
        ("all_steps", 0 <= settings.all_steps <= 1, "a share from 0 to 1"),
        ("threshold", 0 < settings.threshold < 1, "a probability between 0 and 1"),
    ):
        if not fine:
            raise UsageError(
                f"{name} cannot be used", expected=expected, received=getattr(settings, name),
                hint=f"{getattr(ChainSettings, name)}, the default",
            )  # fmt: skip
    if settings.check in ("markers", "rules") and settings.threshold != ChainSettings.threshold:
        raise UsageError(
            f"--check {settings.check} knows no threshold: it says yes or no", expected="no --threshold",
            received=settings.threshold, hint=f"--check {SELF} or model:FOLDER",
        )  # fmt: skip
    if settings.temperature == 0 and settings.retries:
        raise UsageError(
            "at temperature 0 a further try is the same answer again",
            expected="a temperature above 0, or no retries",
            received=f"temperature 0, retries {settings.retries}",
            hint="--retries 0",
        )
    for name, count in settings.budget.items():
        if name not in (*NOTES, ANSWER):
            raise UsageError(f"there is no step {name!r}", hint=did_you_mean(name, (*NOTES, ANSWER)))
        if count < 1:
            raise UsageError("a step needs room for a token", expected="at least 1", received=f"{name}: {count}")


def budget_of(settings: ChainSettings) -> dict[str, int]:
    return BUDGET | {ANSWER: ANSWER_BUDGET} | settings.budget


def read_prompts(path: Path | None) -> Prompts:
    """The house's own where the file has none of that name."""
    if path is None:
        return Prompts()
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read", expected="a JSON file of prompts", received=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON", expected='{"check": "..."}', received=str(error)) from None
    known = [field.name for field in fields(Prompts)]
    if not isinstance(given, dict):
        raise UsageError(f"{path} holds no prompts", expected='{"check": "..."}', received=type(given).__name__)
    for name, text in given.items():
        if name not in known:
            raise UsageError(f"{path}: there is no prompt {name!r}", hint=did_you_mean(name, known))
        if not isinstance(text, str):
            raise UsageError(f"{path}: the prompt {name!r} is no text", expected="text", received=text)
    return Prompts(**given)


def asked(path: Path) -> list[dict[str, Any]]:
    """`read_questions`; each has a name of its own, and holds nothing that would be read as a step."""
    questions = read_questions(path)
    names: set[str | int] = set()
    for row in questions:
        name, question = row["id"], row["question"]
        if not isinstance(name, (str, int)) or isinstance(name, bool) or name in names:
            raise UsageError(
                f"{path}: the id {name!r} cannot be used",
                expected="text or a whole number, another one for every question",
                received="it is there twice" if isinstance(name, (str, int)) else type(name).__name__,
                hint="leave the ids out: the number of the line is taken",
            )
        names.add(name)
        text = question if isinstance(question, str) else "\n".join(turn["content"] for turn in question)
        if found := [token for token in Steps().tokens if token in text]:
            raise UsageError(
                f"{path}: question {name!r} holds a token of a step", expected="text without it", received=found[0]
            )
        try:
            line_of(row).encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{path}: question {name!r} is no text", expected="whole characters", received=error.reason
            ) from None
    return questions


def refuse_taken(settings: ChainSettings) -> None:
    """Nothing that another command or build wrote is lost."""
    out = settings.out
    if out.is_dir() or out.name == REPORT:
        received = "a folder" if out.is_dir() else "the name of the report"
        raise UsageError(f"{out} cannot be written", expected="a file, such as chains.jsonl", received=received)
    report = out.with_name(REPORT)
    if out.exists() and not run_of(out).exists():
        raise UsageError(f"{out} is there already", expected="a free name", received="a file", hint="another --out")
    if report.exists() and of_report(report) != out.name:
        raise UsageError(
            f"{report} is there already",
            expected=f"no report, or that of {out.name}",
            received=f"that of {of_report(report)}",
            hint="--out in another folder",
        )


def of_report(file: Path) -> str:
    """The name of the output that a report is about."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["out"])
    except (OSError, ValueError, KeyError, TypeError):
        return "something else"


def longer_than_context(writer: ChainWriter, questions: Sequence[dict[str, Any]]) -> set[str | int]:
    """Questions for which the model's context has no room, with all steps.

    Raises:
        UsageError: all of them, or a conversation that the model's chat template cannot put.
    """
    from jinja2 import TemplateError

    lengths = {}
    for row in questions:
        try:
            lengths[row["id"]] = writer.longest(Draft(row["id"], row["question"]))
        except TemplateError as error:
            raise UsageError(
                f"the model's chat template does not take question {row['id']!r}",
                expected="turns as the template wants them",
                received=str(error),
                hint="leave the system turn out, or let user and assistant take turns",
            ) from error
    too_long = {name for name, length in lengths.items() if not writer.fits(length)}
    if len(too_long) == len(questions):
        raise UsageError(
            "no question fits into the model's context",
            expected=f"at most {writer.context} tokens with prompts and all steps",
            received=f"{min(lengths.values())} for the shortest",
            hint="--set 'budget={analysis: 64, guidance: 64, answer: 128}'",
        )
    return too_long


# the work


def build(
    settings: ChainSettings, writer: Writer, questions: Sequence[dict[str, Any]], too_long: set[str | int],
    journal: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a question, from the journal as far as it goes; whole batches, cut from the questions in their order."""
    rows = finished(journal, [row["id"] for row in questions], settings.batch_size)
    with Progress("align chain", len(questions), len(rows)) as progress:
        for start in range(len(rows), len(questions), settings.batch_size):
            part = questions[start : start + settings.batch_size]
            drafts = [
                Draft(
                    row["id"], row["question"], dropped="too_long" if row["id"] in too_long else "",
                    all_steps=takes_all_steps(settings, row["id"]),
                )
                for row in part
            ]  # fmt: skip
            build_chains(drafts, writer, retries=settings.retries, threshold=settings.threshold)
            done = [entry_of(row, draft) for row, draft in zip(part, drafts, strict=True)]
            append(journal, done)
            rows += done
            for entry in done:
                progress.advance(shape_of(entry) or f"dropped: {entry['dropped']}")
    return rows


def takes_all_steps(settings: ChainSettings, name: str | int) -> bool:
    """Drawn by the question's name, whatever else is asked."""
    return Random(derived_seed("all steps", settings.seed, json.dumps(name))).random() < settings.all_steps


def entry_of(row: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """A line of the journal; of a question that was dropped no text is kept."""
    chain = {step: draft.texts[step] for step in (*NOTES, ANSWER) if step in draft.texts} if draft.passed else {}
    return {
        "id": draft.id,
        "kind": row.get("kind"),
        "dropped": draft.dropped,
        "chain": chain,
        "tokens": draft.spent,
        "budget_used_up": draft.cut,
        "checks": [[stage, *(verdict or (None, None, None))] for stage, verdict in draft.verdicts],
    }


def publish(
    out: Path, questions: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], report: dict[str, Any]
) -> None:
    """The chains, then the report; each whole or not at all. Without a chain there is no file of chains."""
    texts = {REPORT: json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
    if kept := [line_of(chain_row(row, entry)) for row, entry in zip(questions, rows, strict=True) if entry["chain"]]:
        texts = {out.name: "".join(kept)} | texts
    for name, text in texts.items():
        swap_text(text, out.with_name(name))


def chain_row(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A row of OUT: the question as it came, and what was written for it."""
    return {
        **row,
        "kind": entry["kind"],
        "chain": entry["chain"],
        "attempts": len(entry["checks"]),
        "check": entry["checks"][-1][1],
        "budget_used_up": entry["budget_used_up"],
    }
