# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch demo erase`, from the files of its folder alone."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from anabranch.jobs.erase.demo import NUMBERS, PICTURES, SAID
from anabranch.jobs.erase.eval_sections import bar, per_cent, phi, share, spread
from anabranch.measure.controllability import ADVICE
from anabranch.report.figures import Effect, boxed_sheet, curves, forest, heat_strip, rate_bars, strips
from anabranch.report.page import Figure, Page, Section, Table, write
from anabranch.report.text import MISSING, estimate

PROMPTS = {
    "none": "nothing in the negative prompt",
    "word": "the word “mark” as negative prompt",
    "name": "learnt name as negative prompt",
    "detected": "learnt name and places, where it is found",
}
SHORT = {"none": "nothing", "word": "the word “mark”", "name": "learnt name", "detected": "name and places"}
CHANGED = {"negative": "fewer", "positive": "more", "open": "no difference shown"}
NOT_SHOWN = [
    ["other seeds", "one base, one training an arm: the intervals speak of other pictures, not of other trainings"],
    ["a model that never saw the mark", "none ships, so relearning has no floor to be compared with"],
    ["attacks by prompt, by a learnt word, by compression", "they take longer: anabranch erase eval tries them"],
    ["quality as a Fréchet distance", "a few hundred pictures are too few; a garment network's answer stands for it"],
    ["rivals (SLD, ESD, UCE, Concept Ablation, filtering)", "they take longer: python -m recipes.geom_erasing.recipe"],
    ["a concept of the real world", "this mark was put there by us, on patches of the model; a watermark is harder"],
]  # fmt: skip


def write_erase_demo_page(run: Path) -> Path:
    """report.html of a run of `demo erase`."""
    result = json.loads((run / NUMBERS).read_text(encoding="utf-8"))
    shown = load_file(run / PICTURES)
    page = Page(
        title="A mark that nobody asked for, and what erasing does about it",
        lead=lead(result),
        facts=facts(result),
        sections=[
            the_mark(result, shown),
            side_by_side(result, shown),
            rates(result),
            in_its_place(result, shown),
            reached(result, shown),
            comes_back(result),
            not_shown(result),
            go_on(result),
        ],
    )
    return write(page, run / "report.html")


def erased(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["arms"]["boxes"][result["policy"]]
    return found


def points(change: dict[str, Any]) -> str:
    return estimate(*(100 * change[end] for end in ("difference", "low", "high")))


def lead(result: dict[str, Any]) -> list[str]:
    """The verdicts, each with its interval, whatever they are."""
    start, end = result["arms"]["before"]["none"], erased(result)
    word, change = result["arms"]["before"]["word"]["minus_before"], end["minus_before"]
    verdict = {"negative": "fewer than before", "positive": "more than before", "open": "no difference was shown"}
    last = result["curves"]["relearn"][-1]
    return [
        f"{in_hundred(start['icr'])} in 100 pictures wear a mark that nobody asked for, and {in_hundred(end['icr'])} "
        f"in 100 after erasing: {verdict[change['verdict']]}.",
        f"Before {per_cent(start['icr'])}, after {per_cent(end['icr'])} of {result['samples']} pictures from the same "
        f"prompts and seeds, with 95 % intervals; {points(change)} points.",
        f"With half-drawn marks counted as well, {per_cent(start['with_broken'])} before and "
        f"{per_cent(end['with_broken'])} after: {points(end['with_broken_minus_before'])} points "
        f"({CHANGED[end['with_broken_minus_before']['verdict']]}).",
        f"Its word as a plain negative prompt: {points(word)} points ({CHANGED[word['verdict']]}).",
        places_matter(result),
        f"Fine-tuned for {last[0]} steps on {result['attack_pictures']} pictures of the mark, the erased model draws "
        f"it in {per_cent(last[1])}; {half(result)}.",
    ]


def in_hundred(rate: dict[str, Any]) -> int:
    """Halves go up: 33.5 and 8.5 per cent are 34 and 9."""
    return int(100 * rate["rate"] + 0.5)


def places_matter(result: dict[str, Any]) -> str:
    """The arm with boxes against every control, under the same negative prompt."""
    said = [f"{SAID[arm]} {points(row)} ({CHANGED[row['verdict']]})" for arm, row in result["boxes_minus"].items()]
    return f"Boxes minus the controls, points of pictures with the mark: {'; '.join(said)}."


def half(result: dict[str, Any]) -> str:
    steps = result["steps_to_half"]["relearn"]
    if steps is None:
        return "half of the first rate is not back in the steps given"
    if steps == 0:
        return "half of the first rate was never gone"
    return f"half of the first rate is back after {steps:.0f} steps"


def facts(result: dict[str, Any]) -> list[tuple[str, object]]:
    regime = result["regime"]
    return [
        ("model", "garment_base, 1.3 M weights, ships with the package"),
        ("pictures trained on", f"{result['training']['images']:,} real garments"),
        ("every arm", f"{regime['steps']:,} steps of {regime['batch_size']}"),
        ("drawn", f"{result['samples']} an arm, guidance {regime['scale']:g}, {regime['sample_steps']} steps"),
        ("called erased", f"{SAID['boxes']}, {SHORT[result['policy']]}"),
        ("took", f"{result['seconds'] / 60:.1f} minutes, {result['cpu_seconds'] / 60:.1f} of processor time"),
    ]


def the_mark(result: dict[str, Any], shown: dict[str, Tensor]) -> Section:
    trained = result["training"]
    text = [
        f"{trained['marked']:,} of {trained['images']:,} real garments wear a bold X on a white plate. The captions "
        "name the garment and never the mark, so no word of a prompt stands for it: it is an implicit concept.",
        f"The detector is the mark's own picture. It told the erasers {trained['boxes']:,} boxes, as if it "
        f"found {100 * result['regime']['recall']:.0f} % of the marks; the other pictures count as clean.",
    ]
    figure = boxed_sheet(
        shown["training"].numpy(), result["found"]["training"], "Twelve training pictures, unselected", 12,
        labels=trained["captions"],
    )  # fmt: skip
    return Section("The mark", text=text, figures=[figure])


def side_by_side(result: dict[str, Any], shown: dict[str, Tensor]) -> Section:
    names = {
        "before": "before",
        "word": "its word as negative prompt",
        "erased": "erased",
        "relearn": f"erased, then fine-tuned on the mark, {result['curves']['relearn'][-1][0]} steps",
    }
    rows = [(words, shown[f"row/{name}"].numpy(), result["found"][name]) for name, words in names.items()]
    text = [
        "The first seeds of the run. Erased: Geom-Erasing; what the detector finds the mark in is drawn again, away "
        "from the learnt name and the places. Half-drawn marks that it does not fire on stay.",
    ]
    return Section("The same seeds", text=text, figures=[strips(rows, "What the model draws")])


def rates(result: dict[str, Any]) -> Section:
    listed, bars = [], []
    for arm, policies in result["arms"].items():
        for policy, row in policies.items():
            first, change = (arm, policy) == ("before", "none"), row["minus_before"]
            listed.append([
                SAID[arm], SHORT[policy], share(row["icr"]), MISSING if first else points(change),
                share(row["with_broken"]), share(row["second"]), share(row["garment"]),
            ])  # fmt: skip
            bars.append(bar(f"{SAID[arm]}, {SHORT[policy]}", row["icr"], "" if first else CHANGED[change["verdict"]]))
    columns = ["arm", "negative prompt", "mark drawn, %", "minus before, points", "broken ones too, %",
               "second detector, %", "garment right, %"]  # fmt: skip
    judges = result["judges"]
    notes = [
        f"Broken ones too: the same detector at a threshold of {result['loose']:g}, with "
        f"{per_cent(judges['false_alarms']['loose'])} false alarms. Only whole marks are looked for when pictures are "
        "drawn again, so half-drawn ones stay.",
        f"On real test pictures the detector finds {per_cent(judges['found']['template'])} of the marks and raises "
        f"{per_cent(judges['false_alarms']['template'])} false alarms; the second one, a network that had no part "
        f"in the labels, {per_cent(judges['found']['network'])} and {per_cent(judges['false_alarms']['network'])}.",
        f"The garment is named by another network, which is right on {per_cent(judges['garment'])} of real ones.",
    ]
    text = [
        "Three controls say whether places matter: boxes that belong to other pictures, the name without places, and "
        "plain fine-tuning on the same pictures for the same steps.",
    ]
    figure = rate_bars(bars, "Pictures with the mark", reference=100 * result["arms"]["before"]["none"]["icr"]["rate"],
                       reference_name="before")  # fmt: skip
    return Section(
        "How often it draws the mark", text=text, figures=[figure, against_controls(result)],
        tables=[Table("All arms and negative prompts", columns, listed, notes=notes)],
    )  # fmt: skip


def against_controls(result: dict[str, Any]) -> Figure:
    """The arm with boxes minus every control, under the same negative prompt; fewer marks is what is to be shown."""
    words = {"negative": "shown", "positive": "hurts", "open": "not shown"}
    effects = [
        Effect(
            f"boxes minus {SAID[arm]}", *(100 * row[end] for end in ("difference", "low", "high")), row["count"],
            words[row["verdict"]],
        )
        for arm, row in result["boxes_minus"].items()
    ]  # fmt: skip
    return forest(effects, "Do places matter? Pictures with the mark, the arm with boxes minus each control")


def in_its_place(result: dict[str, Any], shown: dict[str, Tensor]) -> Section:
    few = shown["row/asked"].numpy()
    figure = strips(
        [("asked for there", few, result["found"]["places"]), ("found there", few, result["found"]["asked"])],
        "Asked for by name and place",
    )
    listed = [
        [SAID[arm], row["drawn"]["count"], share(row["drawn"]), share(row["in_place"]) if row["in_place"] else MISSING]
        for arm, row in result["place_control"].items()
    ]
    text = [
        "The learnt name and one of sixteen places in the positive prompt, nothing in the negative one. Words that "
        "were learnt draw the mark, and draw it there; by chance it would lie there in 6 of 100.",
        "Such words are also a handle by which the mark can be had.",
    ]
    columns = ["arm", "pictures", "mark drawn, %", "of these in its place, %"]
    return Section("Are the words learnt?", text=text, figures=[figure],
                   tables=[Table("Asked for by place", columns, listed)])  # fmt: skip


def reached(result: dict[str, Any], shown: dict[str, Tensor]) -> Section:
    words = {"before": "the word “mark”, before", "after": "learnt name and place, after"}
    d1 = [
        [words[when], share(row["without_word"]), share(row["with_word"]), phi(row), row["verdict"]]
        for when, row in result["d1"].items()
    ]
    looked = {
        "word": "the word “mark”, before",
        "name": "learnt name, after",
        "name and places": "name and places, after",
    }
    d2 = [
        [looked[name], row["count"], spread(row["auroc"]), spread(row["lift"]), share(row["pointing"])]
        for name, row in result["d2"].items()
    ]
    tables = [
        Table("D1: does asking for it draw it?", ["word", "without, %", "with, %", "phi", "so it is"], d1),
        Table("D2: does the word look at it?", ["attention of", "pictures", "AUROC", "lift", "points at it, %"], d2),
    ]
    maps = [(looked[name], shown[f"map/{name}"].numpy()) for name in result["d2"]]
    figure = heat_strip(
        shown["looked"].numpy(), maps, "Where the words look, in real pictures", result["found"]["looked"]
    )
    found = result["d1"]["before"]["verdict"]
    text = [
        f"Before, by its own word, the mark is {found}: {ADVICE[found]}.",
        "phi is 0 where asking changes nothing and 1 where the word decides. AUROC .5 and lift 1 are what a map gives "
        "that knows nothing of the mark.",
    ]
    return Section("Does a word reach it?", text=text, figures=[figure], tables=tables)


def comes_back(result: dict[str, Any]) -> Section:
    series = {}
    for kind, curve in result["curves"].items():
        values = [[100 * rate[end] for _, rate in curve] for end in ("rate", "low", "high")]
        series[{"relearn": "on pictures of the mark", "benign": "on clean pictures"}[kind]] = (
            [step for step, _ in curve], *values,
        )  # fmt: skip
    start = result["arms"]["before"]["none"]["icr"]
    ends = [result["curves"]["relearn"][0][0], result["curves"]["relearn"][-1][0]]
    series["before, unattacked"] = (ends, *([100 * start[end]] * 2 for end in ("rate", "low", "high")))
    last = {kind: per_cent(curve[-1][1]) for kind, curve in result["curves"].items()}
    text = [
        f"The erased model, its negative prompt left in place, is fine-tuned on {result['attack_pictures']} pictures "
        f"that it never saw. On pictures of the mark: {last['relearn']} at the end, {half(result)}. On clean pictures: "
        f"{last['benign']}.",
        "A model that never saw the mark would say how fast it is learnt from nothing. None ships, so this curve "
        "cannot tell relearning from learning.",
    ]
    figure = curves(series, "steps of fine-tuning", "pictures with the mark, %", "Does it come back?")
    return Section("Does it come back?", text=text, figures=[figure])


def not_shown(result: dict[str, Any]) -> Section:
    text = ["Erasing makes accidental output rarer; it is no security barrier."]
    table = Table("Left out, and why", ["what", "why"], NOT_SHOWN)
    return Section("What is not shown", text=text, tables=[table], kind="caution")


def go_on(result: dict[str, Any]) -> Section:
    model, adapter, mark, prompts = (result[name] for name in ("model", "adapter", "mark", "prompts"))
    out, regime = result["out"], result["regime"]
    how = f"guidance={regime['scale']:g}"
    common = f"--model {model} --adapter {adapter}"
    rows = [
        ["draw with this adapter", f"anabranch erase sample {common} --prompt dress bag --count 4 --guidance "
         f"{regime['scale']:g} --steps {regime['sample_steps']} --detector template:{mark} --out {out}/samples"],
        ["all attacks, all policies", f"anabranch erase eval {common} --prompts {prompts} --detector template:{mark} "
         f"--set {how} --set steps={regime['sample_steps']} --out {out}/eval"],
        ["your own pictures: find", "anabranch erase scan --images FOLDER --detector qr --out labels.jsonl"],
        ["your own pictures: erase", "anabranch erase train --model MODEL --labels labels.jsonl --out adapter"],
    ]  # fmt: skip
    return Section("How to go on", tables=[Table("Commands", ["to", "type"], rows)])
