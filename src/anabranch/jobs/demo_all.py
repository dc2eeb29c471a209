# SPDX-License-Identifier: Apache-2.0
"""All four demos, each in a process of its own, and one page that leads to theirs.

OUT/transfer, erase, align, experts    what `anabranch demo TOPIC` writes
OUT/demos.json                         how every demo ended, how long it took, and the last lines of one that failed
OUT/report.html                        a picture and the first sentences of each; made anew after each

A demo that fails or is killed takes none of the others with it: a process that ran out of memory is one demo less.
"""

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from anabranch import __version__
from anabranch.errors import DONE, STOPPED, AnabranchError, CheckFailed, UsageError
from anabranch.jobs.settings import DEMOS, DemoFlags
from anabranch.swap import unfinished
from anabranch.train.publish import read_json, write_json
from anabranch.train.run_folder import CONFIG, LOCK, exclusive, writing_to
from anabranch.train.signals import StopFlag

RECORD, PAGE = "demos.json", "report.html"
QUICKEST_FIRST = ("experts", "align", "erase", "transfer")
NUMBERS = {
    "transfer": "demo.json",
    "erase": "demo.json",
    "align": "align-demo.json",
    "experts": "experts-demo.json",
}
"""What each writes last but for its page."""
LAST_LINES, POLL_SECONDS = 12, 0.2
PROGRESS = re.compile(r"\S.* (?P<done>\d+)/(?P<total>\d+)  .*")


class Ended(NamedTuple):
    """One process of a demo."""

    exit_code: int
    seconds: float
    said: list[str]
    """Its last lines on the standard error."""


Run = Callable[[Sequence[str], Callable[[], bool]], Ended]


def demo_all(flags: DemoFlags, run: Run | None = None) -> Path:
    """Run what is not finished, the quickest first; returns the page.

    Raises:
        CheckFailed: a demo failed; the others were run, and the page says which.
        Stopped: a signal came; the same command with --resume goes on.
    """
    check(flags)
    with writing_to(flags.out):
        flags.out.mkdir(parents=True, exist_ok=True)
    with exclusive(flags.out / LOCK, f"the folder {flags.out}"), StopFlag() as stop:
        record = read_record(flags.out)
        for number, topic in enumerate(QUICKEST_FIRST, start=1):
            place = f"demo {number} of {len(DEMOS)}, {topic}"
            if finished(flags.out, topic, record):
                print(f"{place}: finished before, kept\n", flush=True)
                continue
            print(f"{place}: {DEMOS[topic]}", flush=True)
            one(flags.out, topic, record, run or in_a_process, stop)
            print(f"{place}: {in_words(record[topic])}\n", flush=True)
            stop.check(f"stopped during demo {topic}; the same command with --resume goes on")
    page = write_page(flags.out)
    print(f"The page to look at: {page}")
    if failed := [topic for topic in DEMOS if record.get(topic, {}).get("exit_code", DONE) != DONE]:
        hint = f"anabranch demo --resume --out {flags.out}"
        raise CheckFailed(f"{len(failed)} of {len(DEMOS)} demos failed: {', '.join(failed)}", hint=hint)
    return page


def one(out: Path, topic: str, record: dict[str, Any], run: Run, stop: StopFlag) -> None:
    """Run one demo to its end, put into the record how it ended, and make the page anew."""
    ended = run(prepared(out / topic, topic), lambda: stop.is_set)
    record[topic] = told(record.get(topic), ended)
    write_record(out, record)
    write_page(out)


def check(flags: DemoFlags) -> None:
    """A folder of something else is never written to; one of demos only with --resume."""
    out = flags.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", expected="a folder for the demos", hint="another --out")
    names = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if strangers := sorted(names - {*DEMOS, RECORD, unfinished(out / RECORD).name, PAGE, LOCK}):
        received = ", ".join(strangers[:3])
        expected = "an empty folder, a new one, or one of demos"
        raise UsageError(f"{out} holds other things", expected=expected, received=received, hint="another --out")
    begun = names & {*DEMOS, RECORD}
    if begun and not flags.resume:
        hint = "--resume to keep what is finished and run the rest, or another --out"
        raise UsageError(f"{out} already holds demos", received=", ".join(sorted(begun & {*DEMOS})), hint=hint)
    for topic in sorted(begun & {*DEMOS} - {"transfer"}):  # transfer compares its whole configuration itself
        refuse_another(out / topic, topic)
    if flags.resume and not out.exists():
        raise UsageError(f"nothing to resume in {out}: there are no demos", hint="the same command without --resume")


def refuse_another(folder: Path, topic: str) -> None:
    """What is left of this demo will be deleted, what is of something else must not be."""
    if not (folder / CONFIG).is_file():
        return
    made_by = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(made_by, dict) or made_by.get("topic") != topic:
        raise UsageError(f"{folder} is no run of demo {topic}", hint="another --out")


def read_record(out: Path) -> dict[str, Any]:
    """{topic: how it ended}; empty where nothing did."""
    file = out / RECORD
    if not file.exists():
        return {}
    try:
        return dict(read_json(file)["demos"])
    except (AnabranchError, LookupError, ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read", received=error, hint="another --out") from None


def write_record(out: Path, record: dict[str, Any]) -> None:
    write_json(out / RECORD, {"version": __version__, "demos": record})


def finished(out: Path, topic: str, record: dict[str, Any]) -> bool:
    """It ended well here, or was run alone and wrote its page after its numbers."""
    page, numbers = out / topic / PAGE, out / topic / NUMBERS[topic]
    if not (page.is_file() and numbers.is_file()):
        return False
    if topic in record:
        return bool(record[topic]["exit_code"] == DONE)
    return page.stat().st_mtime_ns >= numbers.stat().st_mtime_ns


def prepared(folder: Path, topic: str) -> list[str]:
    """The command of one demo. Transfer goes on where it was; the others take minutes, and what is left of one goes."""
    command = [sys.executable, "-m", "anabranch", "demo", topic, "--out", str(folder)]
    if not (folder / CONFIG).is_file():
        return command
    if topic == "transfer":
        return [*command, "--resume"]
    with exclusive(folder / LOCK, f"the run {folder}"):
        shutil.rmtree(folder)
    return command


def in_a_process(command: Sequence[str], stopped: Callable[[], bool]) -> Ended:
    """Run it to its end; a stop is handed on to it, and its errors are shown and their last lines kept.

    It is in a group of its own: a signal to the whole group would reach it twice, and a second one ends it at once.
    """
    started, last = time.monotonic(), deque[str](maxlen=LAST_LINES)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0) as process:
        reader = threading.Thread(target=hand_on, args=(process.stderr, last))
        reader.start()
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if stopped():
                    process.terminate()
                    process.wait()
        finally:
            process.terminate()  # interrupted: it would go on by itself; nothing happens to one that has ended
            process.wait()
            reader.join()
    return Ended(process.returncode, time.monotonic() - started, list(last))


def hand_on(lines: Any, last: deque[str]) -> None:
    """On a terminal a line of progress is written over the one before it, up to the last of its kind."""
    terminal = sys.stderr.isatty()
    for line in lines:
        moves = PROGRESS.fullmatch(line.rstrip())
        if moves and terminal:
            end = "\n" if moves["done"] == moves["total"] else ""
            line = f"\r\x1b[K{line.rstrip()[: shutil.get_terminal_size().columns - 1]}{end}"
        sys.stderr.write(line)
        sys.stderr.flush()
        if not moves:
            last.append(line.rstrip())


def told(before: dict[str, Any] | None, ended: Ended) -> dict[str, Any]:
    """Seconds are of all attempts; what it said is kept where it failed."""
    seconds = ended.seconds + (before["seconds"] if before else 0.0)
    said = ended.said if ended.exit_code > 0 and ended.exit_code != STOPPED else []
    return {"exit_code": ended.exit_code, "seconds": seconds, "said": said}


def in_words(ended: dict[str, Any]) -> str:
    took = f"{ended['seconds'] / 60:.1f} minutes"
    code = ended["exit_code"]
    if code == DONE:
        return f"finished, {took}"
    if code == STOPPED:
        return f"stopped after {took}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name} after {took}"
    return f"failed with exit code {code} after {took}"


def write_page(out: Path) -> Path:
    from anabranch.jobs.demo_all_page import write_demos_page  # matplotlib is loaded once there is something to draw

    return write_demos_page(out)
