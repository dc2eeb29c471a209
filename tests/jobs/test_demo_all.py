# SPDX-License-Identifier: Apache-2.0
"""All demos in one go: what is run and what is kept, what a failure or a signal leaves, and what the page says."""

import json
import os
import signal
import sys
from collections import deque
from pathlib import Path

import pytest

from anabranch import cli
from anabranch.errors import CheckFailed, Stopped, UsageError
from anabranch.jobs.demo_all import NUMBERS, Ended, demo_all, hand_on, in_a_process
from anabranch.jobs.demo_all_page import last_words, write_demos_page
from anabranch.jobs.erase.demo import PICTURES
from anabranch.jobs.settings import DEMOS, DemoFlags


class Runner:
    """Writes what a demo leaves, or fails as it is told to."""

    def __init__(self, codes=()):
        self.codes, self.commands = dict(codes), []

    def __call__(self, command, stopped):
        topic, folder = command[4], Path(command[6])
        self.commands.append(command[4:])
        folder.mkdir(exist_ok=True)
        (folder / "config.resolved.yaml").write_text(f"topic: {topic}\n")
        code = self.codes.get(topic, 0)
        if code == 0:
            (folder / NUMBERS[topic]).write_text("{}")
            (folder / "report.html").write_text(topic)
        return Ended(code, 60.0, [f"anabranch: {topic} wants more memory"])

    @property
    def topics(self):
        return [command[0] for command in self.commands]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "demo"


def go(out, runner, **flags):
    return demo_all(DemoFlags(out=out, **flags), runner)


def test_all_are_run_once_the_quickest_first_and_their_times_are_kept(out):
    runner = Runner()
    assert go(out, runner) == out / "report.html"
    assert runner.topics == ["experts", "align", "erase", "transfer"]
    record = json.loads((out / "demos.json").read_text())["demos"]
    assert {topic: (one["exit_code"], one["seconds"]) for topic, one in record.items()} == dict.fromkeys(
        DEMOS, (0, 60.0)
    )
    again = Runner()
    go(out, again, resume=True)
    assert again.topics == []


def test_a_failure_keeps_none_of_the_others_from_being_run(out):
    runner = Runner({"align": 1})
    with pytest.raises(CheckFailed, match="1 of 4 demos failed: align"):
        go(out, runner)
    assert runner.topics == ["experts", "align", "erase", "transfer"]
    page = (out / "report.html").read_text()
    assert "3 of 4 demos are finished" in page
    assert "failed with exit code 1 after 1.0 minutes" in page
    assert "align wants more memory" in page
    mended = Runner()
    go(out, mended, resume=True)
    assert mended.topics == ["align"]
    assert json.loads((out / "demos.json").read_text())["demos"]["align"] == {
        "exit_code": 0, "seconds": 120.0, "said": [],
    }  # fmt: skip


def test_what_was_stopped_goes_on_or_begins_anew(out):
    with pytest.raises(CheckFailed):
        go(out, Runner({"erase": -9, "transfer": 75}))
    (out / "erase" / "half.txt").write_text("half")
    (out / "transfer" / "half.txt").write_text("half")
    runner = Runner()
    go(out, runner, resume=True)
    assert runner.commands == [
        ["erase", "--out", str(out / "erase")],
        ["transfer", "--out", str(out / "transfer"), "--resume"],
    ]
    assert not (out / "erase" / "half.txt").exists()
    assert (out / "transfer" / "half.txt").exists()


def test_a_demo_that_was_run_alone_counts_if_its_page_is_newer_than_its_numbers(out):
    for topic in ("erase", "align"):
        Runner()([*"abcd", topic, "--out", str(out.parent / topic)], None)
    out.mkdir()
    (out.parent / "erase").rename(out / "erase")
    (out.parent / "align").rename(out / "align")
    stamp = (out / "align" / "report.html").stat().st_mtime_ns
    os.utime(out / "align" / NUMBERS["align"], ns=(stamp + 10**9,) * 2)
    runner = Runner()
    go(out, runner, resume=True)
    assert runner.topics == ["experts", "align", "transfer"]


def test_a_signal_is_handed_on_and_the_rest_is_left(out, monkeypatch):
    def stopped_by_a_signal(command, stopped):
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        return Ended(75, 1.0, [])

    with pytest.raises(Stopped, match="stopped during demo experts"):
        go(out, stopped_by_a_signal)
    assert list(json.loads((out / "demos.json").read_text())["demos"]) == ["experts"]
    assert "Not run yet: transfer, erase, align" in (out / "report.html").read_text()


def test_a_process_is_run_to_its_end_and_its_last_words_are_kept(capfd):
    script = "import sys; print('out'); print('models 1/2  a  (3 s left)', file=sys.stderr); sys.exit('last words')"
    ended = in_a_process([sys.executable, "-c", script], lambda: False)
    assert (ended.exit_code, ended.said) == (1, ["last words"])
    assert capfd.readouterr() == ("out\n", "models 1/2  a  (3 s left)\nlast words\n")


def test_on_a_terminal_progress_stays_on_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    last = deque()
    hand_on(["models 1/2  a\n", "models 2/2  b\n", "done\n"], last)
    assert capsys.readouterr().err == "\r\x1b[Kmodels 1/2  a\r\x1b[Kmodels 2/2  b\ndone\n"
    assert list(last) == ["done"]


def test_a_stop_ends_the_process():
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(flush=True); time.sleep(60)"
    ended = in_a_process([sys.executable, "-c", script], lambda: True)
    assert ended.exit_code in (75, -15)  # the second where the signal came before the handler
    assert ended.seconds < 50


@pytest.mark.parametrize(
    ("make", "flags", "says"),
    [
        (lambda out: out.write_text(""), {}, "is a file"),
        (lambda out: (out / "thesis").mkdir(parents=True), {"resume": True}, "holds other things"),
        (lambda out: (out / "erase").mkdir(parents=True), {}, "already holds demos"),
        (lambda out: None, {"resume": True}, "nothing to resume"),
        (lambda out: config(out / "erase", "topic: something else"), {"resume": True}, "is no run of demo erase"),
    ],
)
def test_nothing_of_others_is_written_over_or_deleted(out, make, flags, says):
    make(out)
    with pytest.raises(UsageError, match=says):
        go(out, Runner(), **flags)


def config(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(text)


def test_files_that_cannot_be_read_are_said_on_the_page(out):
    go(out, Runner())
    page = write_demos_page(out).read_text()
    assert page.count("Its files cannot be read any more") == len(DEMOS)


def test_a_torn_file_of_one_demo_is_said_on_the_page(out):
    go(out, Runner())
    (out / "erase" / "demo.json").write_text("{}")
    (out / "erase" / PICTURES).write_bytes(b"\x10")
    for odd in ("[]", '{"arms": 3}'):
        (out / "align" / "align-demo.json").write_text(odd)
        page = write_demos_page(out).read_text()
        assert page.count("Its files cannot be read any more") == len(DEMOS)
        assert "header" in page, "the page names what is wrong with the pictures' file"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "5"], "--steps is an option of one demo"),
        (["all", "--seeds", "5"], "--seeds is an option of one demo"),
        (["alll"], "did you mean all?"),
    ],
)
def test_wrong_usage_writes_nothing(arguments, says, out, capsys):
    assert cli.main(["demo", *arguments, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_one_demo_goes_where_the_demo_of_all_finds_it(tmp_path, monkeypatch):
    from anabranch.jobs.experts import demo as experts_demo

    asked = []
    monkeypatch.setattr(experts_demo, "experts_demo", asked.append)
    assert cli.main(["demo", "experts"]) == 0
    assert cli.main(["demo", "experts", "--out", str(tmp_path)]) == 0
    assert [str(flags.out) for flags in asked] == ["runs/demo/experts", str(tmp_path)]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["step 1", "anabranch: peft is not installed", "  try: pip install 'anabranch[align]'"],
         ["anabranch: peft is not installed", "try: pip install 'anabranch[align]'"]),
        (["Traceback (most recent call last):", '  File "x.py", line 3', "MemoryError: no room"],
         ["MemoryError: no room"]),
        ([], []),
    ],
)  # fmt: skip
def test_of_what_was_said_the_page_shows_what_is_wrong(said, shown):
    assert last_words(said) == shown
