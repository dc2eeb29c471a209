# SPDX-License-Identifier: Apache-2.0
"""The sections of the page of `anabranch erase eval`, each from eval.json's numbers and a few pictures."""

from dataclasses import replace
from typing import Any

from anabranch.jobs.erase.arms import Arm
from anabranch.jobs.erase.study import After, Before
from anabranch.measure.controllability import ADVICE
from anabranch.report.figures import RateRow, curves, heat_strip, rate_bars, strips
from anabranch.report.page import Figure, Section, Table
from anabranch.report.text import MISSING, estimate, level

COLUMNS, HEATED = 10, 8
NAMES = {
    "before": "before",
    "word": "the word as negative prompt",
    "no-op": "an eraser that does nothing",
    "never": "a model that never saw it",
    "erased": "erased",
}
LEARNT = {"explicit": "learnt", "implicit": "not learnt", "unclear": "unclear"}
"""What D1's verdict says of words that were made to be a handle on the concept."""
ATTACKS = {
    "paraphrase/named": "asked for by its word",
    "paraphrase/misspelt": "asked for, misspelt",
    "paraphrase/reordered": "asked for in another order",
    "paraphrase/synonyms": "asked for by other words",
    "adversarial_prompt/10": "words before it, 10 steps of search by gradient",
    "adversarial_prompt/20": "the same after 20 steps",
    "adversarial_prompt/40": "the same after 40 steps",
    "prompt_search": "words before it, found with the text encoder alone",
    "concept_inversion": "a word learnt from pictures of it",
    "relearn": "fine-tuned on pictures of it",
    "benign_tuning": "fine-tuned on harmless pictures",
    "compression/int8": "weights of 8 bits",
    "compression/int4": "weights of 4 bits",
    "partial_noise/0.3": "from a picture of it, noised 30 %",
    "partial_noise/0.5": "from a picture of it, noised 50 %",
    "partial_noise/0.7": "from a picture of it, noised 70 %",
}


def per_cent(rate: dict[str, Any]) -> str:
    low, high = (level(100 * rate[end]) for end in ("low", "high"))
    return f"{level(100 * rate['rate'])} % [{low}, {high}]"


def bar(name: str, rate: dict[str, Any], note: str = "") -> RateRow:
    return RateRow(name, 100 * rate["rate"], 100 * rate["low"], 100 * rate["high"], note)


def change_of(row: dict[str, Any]) -> str:
    change = row.get("minus_before")
    return MISSING if change is None else estimate(*(100 * change[end] for end in ("difference", "low", "high")))


def strip_rows(arms: list[tuple[str, Arm]]) -> list[tuple[str, Any, Any]]:
    """As many pictures of each as the shortest has."""
    count = min(COLUMNS, *(len(arm.pixels) for _, arm in arms))
    return [(name, arm.pixels[:count].numpy(), arm.seen.boxes[:count]) for name, arm in arms]


def rates(result: dict[str, Any]) -> Section:
    arms = result["arms"]
    rows = [
        bar(NAMES[name], arms[name]["icr"], f"n = {arms[name]['icr']['count']:,}") for name in NAMES if name in arms
    ]
    second = any("second" in row for row in arms.values())
    columns = ["arm", "pictures", "drawn, %", "corrected, %", "minus before, points", "McNemar p"]
    columns += ["second detector, %", "its corrected"] if second else []
    listed = []
    for name in NAMES:
        if name not in arms:
            continue
        row = arms[name]
        change = row.get("minus_before")
        cells = [NAMES[name], row["icr"]["count"], share(row["icr"]), freed(row["corrected"]), change_of(row)]
        cells.append(MISSING if change is None else f"{change['p_value']:.2g}")
        listed.append(cells + ([share(row["second"]), freed(row["second_corrected"])] if second else []))
    table = Table("All arms", columns, listed, notes=correction_notes(arms["before"]))
    return Section(
        "How often it draws it unasked",
        text=["Share of pictures in which the detector finds the concept, with 95 % Wilson intervals."],
        figures=[rate_bars(rows, "Pictures with the concept", reference=100 * result["floor"]["rate"] or None,
                           reference_name="floor")],
        tables=[table],
    )  # fmt: skip


def share(rate: dict[str, Any]) -> str:
    return estimate(*(100 * rate[end] for end in ("rate", "low", "high")), write=level)


def freed(corrected: dict[str, Any] | str) -> str:
    return MISSING if isinstance(corrected, str) else share(corrected)


def correction_notes(row: dict[str, Any]) -> list[str]:
    """Why a rate stands as the detector gave it."""
    found = [("The detector", row["corrected"]), ("The second detector", row.get("second_corrected"))]
    return [f"{who}: {said}." for who, said in found if isinstance(said, str)]


def under_attack(result: dict[str, Any]) -> list[Section]:
    attacks = result["attacks"]
    if not attacks:
        return []
    who = "erased" if result["verdict"] is not None else "before"
    rows = [bar(ATTACKS.get(name, name), row[who], f"n = {row[who]['count']:,}") for name, row in attacks.items()]
    start = 100 * result["arms"]["before"]["icr"]["rate"]
    figures = [rate_bars(rows, f"Pictures with the concept, {who} model under attack", reference=start,
                         reference_name="before, unattacked")]  # fmt: skip
    listed = [
        [
            ATTACKS.get(name, name),
            *(share(row[part]) if part in row else MISSING for part in ("erased", "before", "never")),
        ]
        for name, row in attacks.items()
    ]
    table = Table(
        "The same attacks on three models, %", ["attack", "erased", "before (ceiling)", "never saw it (floor)"], listed
    )
    text = [
        f"{result['attack_samples']:,} pictures an attack. What needs pictures of the concept was given "
        f"{result['attack_pictures']}.",
        "The negative prompt of the eraser stays in place under every attack. An attack counts as one that brings the "
        "concept back until its whole interval lies below half of the way from the floor to before: few pictures count "
        "against the eraser.",
    ]
    return [Section("Does it come back?", text=text, figures=[*figures, *relearning_curves(result)], tables=[table])]


def relearning_curves(result: dict[str, Any]) -> list[Figure]:
    names = {"relearn": "on pictures of it", "benign": "on harmless pictures"}
    who = {"erased": "erased", "before": "before", "never": "never saw it"}
    figures = []
    for kind, words in names.items():
        series = {}
        for model, runs in result["curves"].items():
            if not runs.get(kind):
                continue
            for number, run in enumerate(runs[kind], 1):
                name = who[model] if len(runs[kind]) == 1 else f"{who[model]}, {number}"
                ends = [[100 * rate[end] for _, rate in run] for end in ("rate", "low", "high")]
                series[name] = ([step for step, _ in run], ends[0], ends[1], ends[2])
        if series:
            figures.append(curves(series, "steps of fine-tuning", "pictures with it, %", f"Fine-tuned {words}"))
    return figures


def control_section(result: dict[str, Any], after: After | None) -> list[Section]:
    control = result["positive_control"]
    if control is None or after is None or after.control is None:
        return []
    arm, asked = after.control.arm, after.control.asked[:COLUMNS]
    few = arm.pixels[: len(asked)].numpy()
    rows = [("asked for in the frame", few, asked), ("found in the frame", few, arm.seen.boxes[: len(few)])]
    figure = replace(strips(rows, "Asked for by name and place"), notes=["The same pictures twice."])
    placed = MISSING if control["in_place"] is None else per_cent(control["in_place"])
    text = [
        f"The learnt name and places in the positive prompt draw it in {per_cent(control['drawn'])} of the pictures; "
        f"of these, {placed} have it where it was asked for ({100 * control['chance']:.0f} % by chance).",
        "A low share means that the words were not learnt, so that naming them in a negative prompt does little. A "
        "high one also says that these words are a handle by which the concept can be had.",
    ]
    return [Section("Are the words learnt?", text=text, figures=[figure])]


def diagnostics(result: dict[str, Any], before: Before, after: After | None) -> Section:
    names = {"before": f"the word “{result['concept']}”, before", "after": "learnt name and places, after"}
    d1 = [
        [
            names[key],
            share(row["without_word"]),
            share(row["with_word"]),
            phi(row),
            row["verdict"] if key == "before" else LEARNT[row["verdict"]],
        ]
        for key, row in result["d1"].items()
    ]
    d2 = [
        [name, row["count"], spread(row["auroc"]), spread(row["lift"]), share(row["pointing"])]
        for name, row in result["d2"].items()
    ]
    tables = [Table("D1: does the word draw it?", ["word", "without, %", "with, %", "phi", "so it is"], d1)]
    if d2:
        tables.append(
            Table("D2: does the word look at it?", ["attention of", "pictures", "AUROC", "lift", "points at it, %"], d2)
        )
    figures = []
    if before.looks is not None:
        maps = [("the word, before", before.looks.maps[:HEATED])]
        if after is not None and after.looks is not None:
            maps += [("learnt name", after.looks[0].maps[:HEATED]), ("name and places", after.looks[1].maps[:HEATED])]
        figures.append(
            heat_strip(before.pictures[:HEATED].numpy(), maps, "Where the words look", before.boxes[:HEATED])
        )
    text = [
        f"Before: {result['d1']['before']['verdict']}, {ADVICE[result['d1']['before']['verdict']]}.",
        "phi is 0 where asking changes nothing and 1 where the word decides. AUROC .5 and lift 1 are what a map gives "
        "that knows nothing of the concept.",
    ]
    return Section("Does a word reach it?", text=text, figures=figures, tables=tables)


def phi(row: dict[str, Any]) -> str:
    return estimate(row["phi"], row["low"], row["high"], 2)


def spread(value: dict[str, Any]) -> str:
    return estimate(value["mean"], value["low"], value["high"], 2, write=level)


def policy_section(result: dict[str, Any]) -> list[Section]:
    policies = result["policies"]
    if not policies:
        return []
    listed = [
        [
            f"{name} (the adapter's)" if name == result["policy"] else name,
            row["icr"]["count"],
            share(row["icr"]),
            change_of(row),
            *quality_cells(row),
        ]
        for name, row in policies.items()
    ]
    listed += [[name, *[MISSING] * 5] for name in result["unfit_policies"]]
    notes = [f"{name}: {why}." for name, why in result["unfit_policies"].items()]
    columns = ["negative prompt", "pictures", "drawn, %", "minus before, points", "Frechet", "KID × 1000"]
    return [
        Section(
            "What else the negative prompt could say",
            text=["Name no more places than the rate asks for; the last columns say what they cost."],
            tables=[Table("The ladder of policies", columns, listed, notes=notes)],
        )
    ]


def quality_cells(row: dict[str, Any]) -> list[object]:
    found = row.get("quality")
    return [MISSING, MISSING] if found is None else [level(found["frechet"], 3), level(1000 * found["kid"], 2)]


def quality_section(result: dict[str, Any]) -> list[Section]:
    arms = {name: row for name, row in result["arms"].items() if row.get("quality")}
    if not arms:
        return []
    first = next(iter(arms.values()))["quality"]
    agrees = any("agreement" in row for row in arms.values())
    columns = ["arm", "Frechet", "KID × 1000", *(["agreement with the prompt"] if agrees else [])]
    listed = [
        [NAMES[name], *quality_cells(row), *([spread(row["agreement"])] if agrees else [])]
        for name, row in arms.items()
    ]
    floor = [level(first["frechet_floor"], 3), level(1000 * first["kid_floor"], 2)]
    listed.append(["two halves of the clean pictures", *floor, *([MISSING] if agrees else [])])
    notes = [first["note"]] if first["note"] else []
    text = [
        f"Distance to {first['num_reference']:,} clean pictures in this space: {first['feature_space']}. Numbers of "
        "one space mean nothing in another. The prompts ask for other things than the concept, so a rise here is what "
        "erasing cost its neighbours.",
    ]
    return [Section("What it cost", text=text, tables=[Table("Quality", columns, listed, notes=notes)])]


def not_measured(result: dict[str, Any]) -> Section:
    rows = [[what, why] for what, why in result["not_measured"].items()]
    reasons = (
        []
        if result["verdict"] is None
        else [f"{reason[:1].upper()}{reason[1:]}." for reason in result["verdict"]["reasons"]]
    )
    text = reasons or ["No verdict without an eraser."]
    return Section("What stands against a deeper verdict", text=text, kind="caution",
                   tables=[Table("Not measured", ["what", "why"], rows)])  # fmt: skip


def detectors(result: dict[str, Any]) -> Section:
    rows = []
    for detector in result["detectors"]:
        alarms = detector["false_alarms"]
        counted = MISSING if alarms is None else f"{alarms[0]} of {alarms[1]}"
        rows.append([detector["name"], detector["version"], detector["threshold"], counted])
    table = Table("Detectors", ["detector", "version", "threshold", "fires on clean pictures"], rows)
    return Section("Who looked", kind="detail", tables=[table])
