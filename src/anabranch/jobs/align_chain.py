# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chain`: the model writes its own chains, a batch at a time, and goes on where it was stopped.

OUT                        a row a kept chain: id, question, kind, chain, stage, tries, check
chain_report.json          how many of which shape, what the check said, what was dropped
.OUT.part, .OUT.seen.json  every question so far, dropped ones too, and what the build began with; gone at the end
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import Stopped, UsageError
from anabranch.jobs.align_questions import read_questions
from anabranch.jobs.align_settings import ChainSettings
from anabranch.jobs.align_train import plain_values_of
from anabranch.jobs.erase_checks import fingerprint_of, same_as_before
from anabranch.jobs.progress import Progress
from anabranch.jobs.stages import say
from anabranch.models.language import open_language_model
from anabranch.specialize.mote.chains import STAGES, Draft, ModelWriter, Prompts, build_chains, prompts_from, self_bleu
from anabranch.specialize.mote.mote import fingerprint
from anabranch.specialize.mote.steps import Steps
from anabranch.train.signals import StopFlag

REPORT = "chain_report.json"


def align_chain(settings: ChainSettings) -> dict[str, Any]:
    """Write settings.out and the report; returns the report."""
    check(settings)
    questions, prompts = read_questions(settings.questions), read_prompts(settings.prompts_file)
    refuse_step_tokens(settings.questions, questions)
    model, tokenizer = open_language_model(settings.model)
    writer = ModelWriter(
        model=model, tokenizer=tokenizer, prompts=prompts, seed=settings.seed, temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens={"analysis": settings.analysis_tokens, "guidance": settings.guidance_tokens,
                        "answer": settings.answer_tokens},
    )  # fmt: skip
    part, seen = (settings.out.with_name(f".{settings.out.name}.{end}") for end in ("part", "seen.json"))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in plain_values_of(settings).items() if name not in ("model", "questions")}
    began = {"model": fingerprint(model), "questions": fingerprint_of(questions), "prompts": fingerprint_of([prompts])}
    if part.exists() and not settings.resume:
        raise UsageError(f"{part} holds a build that was stopped", hint="--resume to go on, or another --out")
    same_as_before(seen, began | {"settings": fingerprint_of([values])})
    write_all(settings, questions, writer, prompts, part)
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    report = report_of(rows, settings) | began | {"settings": values}
    kept = [{name: row[name] for name in row if name != "dropped"} for row in rows if not row["dropped"]]
    unfinished = settings.out.with_name(f".{settings.out.name}.unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    told = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    settings.out.with_name(REPORT).write_text(told, encoding="utf-8")
    unfinished.replace(settings.out)
    part.unlink()
    seen.unlink()
    tell(settings, report)
    return report


def check(settings: ChainSettings) -> None:
    if settings.out.exists():
        raise UsageError(f"{settings.out} is there already", expected="a free name", hint="another --out")
    for name in ("batch_size", "analysis_tokens", "guidance_tokens", "answer_tokens"):
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} is too small", expected="at least 1", received=getattr(settings, name))
    if settings.retries < 0 or not 0 <= settings.threshold < 1 or settings.temperature < 0:
        raise UsageError(
            "retries, threshold, temperature", expected="0 or more, [0, 1), 0 or more",
            received=f"{settings.retries}, {settings.threshold}, {settings.temperature}",
        )  # fmt: skip


def read_prompts(path: Path | None) -> Prompts:
    if path is None:
        return Prompts()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", expected="JSON with prompts by name", received=str(error)) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no prompts", expected='{"check": "...", ...}', received=type(values).__name__)
    return prompts_from(values)


def refuse_step_tokens(path: Path, questions: Sequence[dict[str, Any]]) -> None:
    for row in questions:
        told = json.dumps(row["question"])
        if found := [token for token in Steps().tokens if token in told]:
            raise UsageError(
                f"{path}: question {row['id']} holds {found[0]}", expected="questions without tokens of steps"
            )


def write_all(
    settings: ChainSettings, questions: list[dict[str, Any]], writer: ModelWriter, prompts: Prompts, part: Path
) -> None:
    """Batch after batch into the part file; whole batches that are there already are not made again."""
    size = settings.batch_size
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    done = len(questions) if len(whole) == len(questions) else len(whole) // size * size
    part.write_text("".join(whole[:done]), encoding="utf-8")
    with StopFlag() as stop, Progress("align chain", len(questions)) as progress:
        for _ in range(done):
            progress.advance("made before")
        for start in range(done, len(questions), size):
            if stop.is_set:
                raise Stopped(f"stopped on request after {start} of {len(questions)} questions", hint="--resume")
            asked = questions[start : start + size]
            drafts = build_chains(
                [row["question"] for row in asked], writer, prompts, tag=str(start), retries=settings.retries,
                threshold=settings.threshold,
            )  # fmt: skip
            rows = [row_of(row, draft) for row, draft in zip(asked, drafts, strict=True)]
            with part.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            for row in rows:
                progress.advance("dropped" if row["dropped"] else " + ".join(row["chain"]))


def row_of(asked: dict[str, Any], draft: Draft) -> dict[str, Any]:
    row = {name: asked[name] for name in ("id", "question", "kind") if name in asked}
    chain = {**draft.chain, "answer": draft.answer}
    return row | {
        "chain": chain, "stage": draft.passed, "tries": draft.tries, "check": round(draft.check, 6),
        "dropped": draft.passed is None,
    }  # fmt: skip


def report_of(rows: Sequence[dict[str, Any]], settings: ChainSettings) -> dict[str, Any]:
    kept = [row for row in rows if not row["dropped"]]
    shapes = Counter("+".join(row["chain"]) for row in kept)
    tried = {stage: sum(stage in row["tries"] for row in rows) for stage in STAGES}
    texts = {step: [row["chain"][step] for row in kept if step in row["chain"]] for step in Steps().names}
    report: dict[str, Any] = {
        "attempted": len(rows),
        "kept": len(kept),
        "dropped": len(rows) - len(kept),
        "shapes": dict(shapes),
        "pass_rate": {s: sum(row["stage"] == s for row in rows) / n if n else None for s, n in tried.items()},
        "mean_words": {s: sum(len(t.split()) for t in told) / len(told) if told else 0 for s, told in texts.items()},
        "self_bleu": {step: round(self_bleu(told), 2) for step, told in texts.items()},
        "by_kind": {
            kind: {"attempted": len(part), "kept": sum(not row["dropped"] for row in part)}
            for kind in sorted({row.get("kind", "") for row in rows} - {""})
            if (part := [row for row in rows if row.get("kind") == kind])
        },
        "judge": "the model itself: its check is optimistic wherever the model is",
    }
    return report | {"warnings": warnings_of(report)}


def warnings_of(report: dict[str, Any]) -> list[str]:
    warnings = []
    if not report["kept"]:
        warnings.append("no answer passed the check: there is nothing to train on")
    elif report["shapes"].get("answer") == report["kept"] and not report["dropped"]:
        warnings.append("every first answer passed: the check says yes to anything, or nothing was risky")
    elif "answer" not in report["shapes"]:
        warnings.append("no first answer passed: the model will not learn to answer easy questions directly")
    return warnings


def tell(settings: ChainSettings, report: dict[str, Any]) -> None:
    say(f"{report['kept']} chains of {report['attempted']} questions, {report['dropped']} dropped")
    for shape, count in report["shapes"].items():
        say(f"  {count:>6}  {shape}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    say(f"judged by {report['judge']}")
    say(f"\nchains   {settings.out}")
    say(f"next     anabranch align train --model {settings.model} --chains {settings.out} --out mote")
