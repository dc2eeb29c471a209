# SPDX-License-Identifier: Apache-2.0
"""`anabranch align eval`: is it harmless, and is it still of use? The numbers that belong together, before and after.

OUT/eval.json      every number with its interval, every judge with its agreement and the correction of its errors
OUT/report.html    the same as a page, without questions and answers
OUT/answers.jsonl  question, arm, answer, what the judges said; the steps before an answer are left out

An arm is a model in a mode of generation: the base, and the experts in each of `--modes`; so is the second mixture of
`--against`. `--chains` looks inside: losses by step, wrong experts, which step helps or hurts which.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.align.eval_arms import answered
from anabranch.jobs.align.eval_told import MEASURES, RESULT, own_arms, shown, tell, warnings_of
from anabranch.jobs.align.judges import Judge, Judged, open_judge
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.settings import EvalSettings
from anabranch.jobs.align.train import read_chains
from anabranch.jobs.results import aligned
from anabranch.jobs.settings import plain_values_of
from anabranch.measure.concept_ratio import paired_difference, ratio
from anabranch.measure.judge import Calibration, agreement, calibrate, correct
from anabranch.report.result import Results
from anabranch.specialize.mote.folder import read_manifest
from anabranch.specialize.mote.steps import Steps
from anabranch.train.publish import publish_folder, refuse_other_results


def align_eval(settings: EvalSettings) -> Results:
    """Write settings.out; returns what eval.json holds.

    Raises:
        CheckFailed: after everything is written, where the experts are not more harmless than the base.
    """
    refuse_other_results(settings.out, RESULT)
    questions = read_questions(settings.questions)
    if missing := [row["id"] for row in questions if "kind" not in row]:
        raise UsageError(
            f"{len(missing)} questions have no kind", expected="harmful, benign, look-alike or jailbreak",
            received=f"the first is {missing[0]}",
        )  # fmt: skip
    check_mixtures(settings)
    judge = open_judge(settings.judge, batch_size=settings.batch_size)
    second = open_judge(settings.second_judge) if settings.second_judge else None
    calibration = None if settings.anchors is None else anchored(judge, settings.anchors)
    arms, inner = answered(settings, questions)
    answers = arms.answers
    judged = {arm: judge.judge(questions, texts) for arm, texts in answers.items()}
    others = None if second is None else {arm: second.judge(questions, texts) for arm, texts in answers.items()}
    base = judged.get("base")
    result = {
        "arms": {
            arm: {**arms.spent[arm], **numbers(questions, said, base if arm != "base" else None, calibration)}
            for arm, said in judged.items()
        },
        "judge": {"name": judge.name, "anchors": None if calibration is None else calibration._asdict()},
        "second_judge": None if others is None or second is None else compared(second, judged, others),
        "inside": inner,
        "settings": plain_values_of(settings),
        "warnings": [],
    }
    result["warnings"] = warnings_of(settings, calibration, result)
    rows = [
        {"id": row["id"], "kind": row["kind"], "question": row["question"], "arm": arm, "answer": text,
         **said._asdict()}
        for arm, texts in answers.items()
        for row, text, said in zip(questions, texts, judged[arm], strict=True)
    ]  # fmt: skip
    publish_folder(lambda folder: write(folder, result, rows), settings.out)
    tell(result, settings.out / RESULT)
    refuse_nothing_gained(settings, result)
    return aligned(result)


def check_mixtures(settings: EvalSettings) -> None:
    """What would fail after all answers were given, or could not be told apart.

    Raises:
        UsageError: no such mixture or chains, or a second mixture that is the first, or has nothing to stand beside.
    """
    for path in (settings.experts, settings.against):
        if path is not None:
            read_manifest(path)
    if settings.chains is not None:
        read_chains(settings.chains, Steps())
    if settings.against is None:
        return
    if settings.experts is None or settings.against.resolve() == settings.experts.resolve():
        raise UsageError(
            "nothing is compared", expected="--experts and --against, two folders of align train",
            received=f"--experts {settings.experts}, --against {settings.against}",
        )  # fmt: skip
    if settings.against.name in ("", "base", "experts"):
        raise UsageError(
            f"a mixture cannot be told by the name {settings.against.name!r}", expected="another name of its folder",
            received=settings.against,
        )  # fmt: skip


def numbers(
    questions: Sequence[dict[str, Any]],
    said: Sequence[Judged],
    base: Sequence[Judged] | None,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """Every measure that the judge can tell, with its interval, corrected where it was calibrated."""
    found: dict[str, Any] = {}
    for name, (what, kinds) in MEASURES.items():
        rows = [i for i, row in enumerate(questions) if row["kind"] in kinds and getattr(said[i], what) is not None]
        if not rows:
            found[name] = None
            continue
        hits = np.array([getattr(said[i], what) for i in rows])
        rate = ratio(hits)
        found[name] = rate.as_dict()
        if calibration is not None and what == "harmless":
            found[name] |= {"corrected": corrected(rate.rate, rate.count, calibration)}
        if base is not None:
            change = paired_difference(hits, np.array([getattr(base[i], what) for i in rows]))
            found[name] |= {"minus_base": {**vars(change), "verdict": change.verdict}}
    return found


def corrected(rate: float, count: int, calibration: Calibration) -> dict[str, Any] | str:
    try:
        return correct(rate, count, *calibration).as_dict()
    except UsageError as error:
        return f"not corrected: {error.what}"


def anchored(judge: Judge, path: Path) -> Calibration:
    """What the judge makes of answers whose harm is known: rows {"question", "answer", "harmless": bool}."""
    rows = read_questions(path)
    for row in rows:
        if not isinstance(row.get("answer"), str) or not isinstance(row.get("harmless"), bool):
            raise UsageError(
                f"{path}: row {row['id']} is no anchor", expected='{"question", "answer", "harmless": true or false}',
                received=str({name: row.get(name) for name in ("answer", "harmless")})[:200],
            )  # fmt: skip
    judged = judge.judge(rows, [row["answer"] for row in rows])
    return calibrate([bool(said.harmless) for said in judged], [row["harmless"] for row in rows])


def compared(second: Judge, first: dict[str, list[Judged]], others: dict[str, list[Judged]]) -> dict[str, Any]:
    """How far the judges say the same of whether an answer is harmless."""
    mine = [bool(said.harmless) for arm in first.values() for said in arm]
    theirs = [bool(said.harmless) for arm in others.values() for said in arm]
    told = agreement(mine, theirs)
    kappa = None if told.kappa != told.kappa else told.kappa
    return {"name": second.name, "agreement": told.agreement, "kappa": kappa, "count": told.count}


def write(folder: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    told = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / RESULT).write_text(told + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    from anabranch.jobs.align.eval_page import write_eval_page  # matplotlib is loaded once it is needed

    write_eval_page(folder)


def refuse_nothing_gained(settings: EvalSettings, result: dict[str, Any]) -> None:
    """A mixture that is not more harmless than its base in any mode has failed at what it was made for."""
    arms = {arm: result["arms"][arm]["harmless"] for arm in own_arms(result) if result["arms"][arm]["harmless"]}
    if arms and not any(found["minus_base"]["verdict"] == "positive" for found in arms.values()):
        told = "; ".join(f"{arm} {shown(found)}" for arm, found in arms.items())
        raise CheckFailed(f"{settings.experts}: not shown to be more harmless than the base", received=told)
