# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch demo`: of each demo a picture, its first sentences, and the way to its own page."""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from anabranch.errors import DONE
from anabranch.jobs.align import demo_page as align_demo_page
from anabranch.jobs.align import eval_page as align_eval_page
from anabranch.jobs.demo_all import NUMBERS, PAGE, finished, in_words, read_record
from anabranch.jobs.erase import demo_page as erase_demo_page
from anabranch.jobs.erase.demo import PICTURES
from anabranch.jobs.experts import demo_page as experts_demo_page
from anabranch.jobs.settings import DEMOS
from anabranch.jobs.transfer import demo_page, measure_page
from anabranch.report.page import Figure, Page, Section, write
from anabranch.swap import DISK_ERRORS

TITLES = {
    "transfer": "Where sharing hurts, and what experts do about it",
    "erase": "A mark that nobody asked for, and what erasing does about it",
    "align": "A model that thinks before it answers",
    "experts": "What the experts of a mixture know",
}


class Shown(NamedTuple):
    """What the page says of one demo."""

    sentences: list[str]
    figure: Figure
    budget: str


def write_demos_page(out: Path) -> Path:
    """report.html of a folder of demos, finished or not, from its files alone."""
    record = read_record(out)
    done = [topic for topic in DEMOS if finished(out, topic, record)]
    page = Page(
        title="The demos",
        lead=lead(done, record),
        facts=facts(done, record),
        sections=[section(out, topic, record, topic in done) for topic in DEMOS],
    )
    return write(page, out / PAGE)


def lead(done: list[str], record: dict[str, Any]) -> list[str]:
    failed = [topic for topic in DEMOS if record.get(topic, {}).get("exit_code", DONE) != DONE]
    missing = [topic for topic in DEMOS if topic not in done and topic not in failed]
    said = [f"{'All four' if len(done) == len(DEMOS) else f'{len(done)} of {len(DEMOS)}'} demos are finished."]
    if failed:
        said.append(f"Not finished: {', '.join(failed)}. The others were run all the same.")
    if missing:
        said.append(f"Not run yet: {', '.join(missing)}.")
    return [*said, "Everything here was made on this machine, from data and models that ship with the package."]


def facts(done: list[str], record: dict[str, Any]) -> list[tuple[str, object]]:
    """How long each took, and on what; one that was run alone says so on its own page."""
    alone = {topic: "run alone" if topic in done else "not run yet" for topic in DEMOS}
    took = [(topic, in_words(record[topic]) if topic in record else alone[topic]) for topic in DEMOS]
    minutes = sum(one["seconds"] for one in record.values()) / 60
    return [
        *took,
        *([("in all", f"{minutes:.1f} minutes")] if record else []),
        ("cores", len(os.sched_getaffinity(0))),
        ("Python, torch", f"{platform.python_version()}, {version('torch')}"),
    ]


def section(out: Path, topic: str, record: dict[str, Any], done: bool) -> Section:
    """One demo; a caution where it failed or its files cannot be read."""
    if not done:
        return unfinished(topic, record.get(topic))
    try:
        shown = SHOWN[topic](out / topic)
    except (*DISK_ERRORS, ValueError, LookupError, TypeError) as error:
        said = (
            f"Its files cannot be read any more ({error}). anabranch demo {topic} with another --out makes them anew."
        )
        return Section(TITLES[topic], text=[said], kind="caution")
    return Section(
        TITLES[topic],
        text=[*shown.sentences, shown.budget],
        links=[(f"The whole page of demo {topic}", f"{topic}/{PAGE}")],
        figures=[shown.figure],
    )


def unfinished(topic: str, ended: dict[str, Any] | None) -> Section:
    again = "The same command with --resume runs it."
    if ended is None:
        return Section(TITLES[topic], text=[f"Demo {topic} was not run yet. {again}"])
    last = [f"It said: {'; '.join(words)}" for words in [last_words(ended["said"])] if words]
    return Section(TITLES[topic], text=[f"Demo {topic} {in_words(ended)}. {again}", *last], kind="caution")


def last_words(said: list[str]) -> list[str]:
    """From the last line in which the command says what is wrong; of a crash, its last line."""
    started = max((i for i, line in enumerate(said) if line.startswith("anabranch: ")), default=len(said) - 1)
    return [line.strip() for line in said[max(started, 0) :] if line.strip()]


def read(folder: Path, topic: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / NUMBERS[topic]).read_text(encoding="utf-8"))
    return found


def transfer(folder: Path) -> Shown:
    result = read(folder, "transfer")
    measured = json.loads((folder / "transfer.json").read_text(encoding="utf-8"))
    said = [
        measure_page.transfer_lead(measured)[0],
        *demo_page.planted_lead(result),
        *demo_page.experts_lead(result)[-1:],
    ]
    budget = f"{measured['seeds']} seeds, {result['steps']:,} + {result['steps']:,} steps of a model."
    return Shown(said, measure_page.transfer_matrix(measured).figures[0], budget)


def erase(folder: Path) -> Shown:
    result, pictures = read(folder, "erase"), load_file(folder / PICTURES)
    regime = result["regime"]
    budget = f"One seed, {regime['steps']:,} steps of {regime['batch_size']} pictures an arm."
    said = erase_demo_page.lead(result)
    return Shown([said[0], said[-1]], erase_demo_page.side_by_side(result, pictures).figures[0], budget)


def align(folder: Path) -> Shown:
    result = read(folder, "align")
    said = align_demo_page.lead(result)
    if not result["passed"]:
        said.append("Its own check failed: the experts are not shown to be more harmless than the base.")
    budget = f"One seed, {result['steps']:,} steps of a mixture."
    return Shown(said, align_eval_page.bars(result["eval"], "harmless"), budget)


def experts(folder: Path) -> Shown:
    result = read(folder, "experts")
    figure = experts_demo_page.who_reads_what(result).figures[0]
    return Shown(experts_demo_page.lead(result), figure, "One seed; nothing is trained.")


SHOWN: dict[str, Callable[[Path], Shown]] = {
    "transfer": transfer,
    "erase": erase,
    "align": align,
    "experts": experts,
}
