# SPDX-License-Identifier: Apache-2.0
"""What `anabranch align chain` reports: counts, rates of the check, lengths, likeness, and what is suspicious."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from anabranch.jobs.align.refusals import refuses
from anabranch.jobs.align.settings import ChainSettings
from anabranch.jobs.progress import say
from anabranch.measure.concept_ratio import wilson
from anabranch.measure.judge import agreement
from anabranch.measure.self_bleu import self_bleu
from anabranch.specialize.mote.chain_building import ANSWER, NOTES

REPORT = "chain_report.json"
SHAPES = ("answer", "analysis+answer", "analysis+guidance+answer")
REASONS = ("check", "empty", "too_long")
UNMARKED = "unmarked"
NOTE = "the self-check is the model judging itself: have others judge a sample before you rely on it"
ALWAYS, OFTEN_CUT, LITTLE_MASS, COIN = 0.95, 0.05, 0.1, 0.6


def shape_of(entry: Mapping[str, Any]) -> str:
    return "+".join(entry["chain"])


def report_of(rows: Sequence[Mapping[str, Any]], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of all questions and of each kind, from the lines of the journal."""
    kinds = sorted({row["kind"] or UNMARKED for row in rows})
    numbers = {
        "all": numbers_of(rows),
        "by_kind": {kind: numbers_of([row for row in rows if (row["kind"] or UNMARKED) == kind]) for kind in kinds},
    }
    told = {"warnings": warnings_for(numbers), "note": note_of(made_with)}
    return {"out": made_with["out"], **numbers, **told, **made_with}


def note_of(made_with: Mapping[str, Any]) -> str:
    check = made_with.get("settings", {}).get("check", "self")
    return NOTE if check == "self" else f"{check} decided which answers pass; the model's own word is own_check"


def numbers_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept = [row for row in rows if row["chain"]]
    shapes = [shape_of(row) for row in kept]
    verdicts = [check for row in rows for check in row["checks"] if check[1] is not None]
    written = {step: [row["tokens"][step] for row in kept if step in row["chain"]] for step in (*NOTES, ANSWER)}
    cut = {step: sum(step in row["budget_used_up"] for row in kept) for step in written}
    refusals = sum(refuses(row["chain"][ANSWER]) for row in kept)
    return {
        "attempted": len(rows),
        "kept": len(kept),
        "shapes": {shape: shapes.count(shape) for shape in SHAPES},
        "dropped": {reason: sum(row["dropped"] == reason for row in rows) for reason in REASONS},
        "checks": checks_of(rows),
        "empty_answers": sum(check[1] is None for row in rows for check in row["checks"]),
        "probability_of_the_words": fmean(check[2] for check in verdicts) if verdicts else None,
        "own_check": own_check(verdicts),
        "tokens": {step: fmean(counts) if counts else None for step, counts in written.items()},
        "budget_used_up": {step: {"count": cut[step], "of": len(counts)} for step, counts in written.items()},
        "refusals": wilson(refusals, len(kept)).as_dict() if kept else None,
        "self_bleu": {
            "chain": self_bleu(["\n".join(row["chain"].values()) for row in kept]),
            **{step: self_bleu([row["chain"][step] for row in kept if step in row["chain"]]) for step in written},
        },
    }


def checks_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By stage, in the order in which they come: the share of answers that passed, with its 95 % Wilson interval."""
    tried: dict[str, list[bool]] = {}
    for row in rows:
        for number, (stage, *_) in enumerate(row["checks"]):
            tried.setdefault(stage, []).append(bool(row["chain"]) and number == len(row["checks"]) - 1)
    return {stage: wilson(sum(passed), len(passed)).as_dict() for stage, passed in tried.items()}


def own_check(verdicts: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """How far the model's own yes goes with the judge that decided in its place; auroc: chance is .5, kappa's is 0."""
    both = [(own, passed == 1) for _, passed, _, own in verdicts if own is not None]
    good, bad = ([own for own, passed in both if passed is verdict] for verdict in (True, False))
    if not good or not bad:
        return None
    told = agreement([own >= 0.5 for own, _ in both], [passed for _, passed in both])
    above = fmean((a > b) + 0.5 * (a == b) for a in good for b in bad)
    kappa = None if told.kappa != told.kappa else told.kappa
    return {"agreement": told.agreement, "kappa": kappa, "auroc": above, "count": len(both)}


def warnings_for(numbers: Mapping[str, Any]) -> list[str]:
    everything, found = numbers["all"], []
    kept, attempted, dropped = everything["kept"], everything["attempted"], everything["dropped"]
    if not kept:
        found.append(f"the model never passes its own check: 0 of {attempted} questions were kept")
    elif everything["shapes"]["answer"] == kept:
        found.append("the model always answers directly: no analysis and no guidance to learn from")
    if kept and everything["refusals"]["rate"] >= ALWAYS:
        refused = everything["refusals"]["hits"]
        found.append(f"the model always refuses: {refused} of {kept} answers begin like a refusal")
    own = everything.get("own_check")
    if own is not None and own["auroc"] < COIN:
        ranked = f"{own['auroc']:.2f} of the pairs (a coin: .50)"
        found.append(f"the model cannot check itself: its own yes ranks good answers above bad ones in {ranked}")
    mass = everything["probability_of_the_words"]
    if mass is not None and mass < LITTLE_MASS:
        found.append(f"the check's two words have {mass:.2f} of the probability: the model hardly answers with them")
    for step, cut in everything["budget_used_up"].items():
        if cut["count"] > OFTEN_CUT * cut["of"]:
            found.append(f"{step}: {cut['count']} of {cut['of']} texts used their budget up and end in mid-sentence")
    if dropped["too_long"]:
        found.append(f"{dropped['too_long']} questions are too long for the model's context and were dropped")
    if dropped["empty"]:
        found.append(f"{dropped['empty']} questions were dropped because the model wrote nothing for a step")
    return found


def tell(settings: ChainSettings, report: Mapping[str, Any]) -> None:
    numbers = report["all"]
    kept = ", ".join(f"{count} {shape}" for shape, count in numbers["shapes"].items())
    say(f"{numbers['attempted']} questions: {kept}, {sum(numbers['dropped'].values())} dropped")
    for stage, rate in numbers["checks"].items():
        name = {"direct": "direct answer"}.get(stage, stage if stage.startswith("retry") else f"after {stage}")
        interval = f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
        say(f"{name:<16} {100 * rate['rate']:.1f} % passed {interval}, n = {rate['count']}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    say(f"note: {report['note']}")
    if numbers["kept"]:
        say(f"\nchains   {settings.out}")
    say(f"report   {settings.out.with_name(REPORT)}")
    if numbers["kept"]:
        say(f"next     anabranch align train --model {settings.model} --chains {settings.out}")
