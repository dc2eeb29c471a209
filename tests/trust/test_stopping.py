# SPDX-License-Identifier: Apache-2.0
"""SIGTERM in five loops: what was finished is kept, and the resumed loop ends with the same result.

The signal is raised in this process, at a drawn look at the flag; two whole processes get one from outside, one SIGTERM
and one SIGUSR1.
"""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from anabranch.errors import AnabranchError, Stopped
from anabranch.jobs.erase.sample import erase_sample
from anabranch.jobs.erase.settings import SampleSettings
from tests.jobs.erase.world import saved
from tests.trust import stopping
from tests.trust.stopping import Ended, Moments, counting, without_protection

LOOPS = ("training", "evaluating", "profiling", "chains", "sampling")
DEAR = "evaluating"
"""A model is trained and probed for each unit: with the slow ones alone."""


@pytest.fixture
def make(tiny, folders, tmp_path):
    places = {"training": tiny, "evaluating": folders}
    return lambda name: getattr(stopping, name)(places.get(name, tmp_path / f"{name}-given"))


def whole_of(loop, folder, monkeypatch):
    """The undisturbed result, how often a flag was looked at, and how many units it took."""
    folder.mkdir()
    with monkeypatch.context() as patch, counting(loop) as units:
        moments = Moments(patch)
        loop.run(folder, False)
    return loop.result(folder), moments.looks, len(units)


def disturbed(loop, folder, moment, monkeypatch, protected=True):
    """How it ended, the result after a resume, and how many units were begun in all."""
    folder.mkdir()
    with counting(loop) as units:
        with monkeypatch.context() as patch:
            if not protected:
                without_protection(patch)
            Moments(patch, moment)
            how = "finished"
            try:
                loop.run(folder, False)
            except (Stopped, Ended) as error:
                how = type(error).__name__
        if how != "finished":
            try:
                loop.run(folder, True)
            except AnabranchError as error:  # there may be nothing to resume
                if protected:
                    return f"{how}, then {error.what}", None, 0
                loop.run(folder.with_name(f"{folder.name}-anew"), False)
                folder = folder.with_name(f"{folder.name}-anew")
        return how, loop.result(folder), len(units)


def try_moments(loop, count, tmp_path, monkeypatch, protected=True):
    """Moments after which another result came out, or more than the unit in hand was done twice."""
    expected, looks, units = whole_of(loop, tmp_path / f"whole-{protected}", monkeypatch)
    moments = sorted(random.Random(count).sample(range(1, looks + 1), min(count, looks)))
    harmed, ends = [], []
    for moment in moments:
        folder = tmp_path / f"{protected}-{moment}"
        how, found, begun = disturbed(loop, folder, moment, monkeypatch, protected)
        ends.append(how)
        harmed += [] if found == expected and begun <= units + 1 else [(moment, how, begun, units)]
    return moments, ends, harmed


@pytest.mark.row("R6", sample=True)
@pytest.mark.parametrize("name", [name for name in LOOPS if name != DEAR])
def test_three_moments(make, name, tmp_path, monkeypatch, counted):
    moments, ends, harmed = try_moments(make(name), 3, tmp_path, monkeypatch)
    assert harmed == []
    assert "Stopped" in ends
    counted(len(moments), len(harmed))


@pytest.mark.slow
@pytest.mark.row("R6", cheap=True)
@pytest.mark.parametrize("name", LOOPS)
def test_twenty_moments(make, name, tmp_path, monkeypatch, counted):
    moments, ends, harmed = try_moments(make(name), 20, tmp_path, monkeypatch)
    assert harmed == []
    assert ends.count("Stopped") >= 0.8 * len(ends), ends
    counted(len(moments), len(harmed))


@pytest.mark.row("R6")
def test_a_signal_while_pictures_are_drawn_leaves_no_half_of_them(tmp_path, monkeypatch, counted):
    """They are drawn anew: what was drawn by then is not kept, nor is it left lying about."""
    model = saved(tmp_path / "model")

    def draw(name):
        erase_sample(
            SampleSettings(
                model=model, prompt=("a dress",), count=4, batch_size=1, steps=2, out=tmp_path / "out" / name
            )
        )
        return [path.read_bytes() for path in sorted((tmp_path / "out" / name).glob("*.png"))]

    (tmp_path / "out").mkdir()
    whole, wrong = draw("whole"), []
    for moment in (1, 2, 4):
        with monkeypatch.context() as patch:
            Moments(patch, moment)
            with pytest.raises(Stopped, match=f"{moment - 1} of 4 pictures drawn"):
                draw(str(moment))
        left = [path.name for path in (tmp_path / "out").iterdir() if path.name != "whole"]
        wrong += [] if left == [] and draw(str(moment)) == whole else [(moment, left)]
        shutil.rmtree(tmp_path / "out" / str(moment))
    assert len(whole) == 4
    assert wrong == []
    counted(3, len(wrong))


@pytest.mark.row("R6")
def test_where_nobody_handles_the_signal_finished_work_is_lost(make, tmp_path, monkeypatch, counted):
    """The control. Chains and answers are in a journal after every batch: their loops would lose little without."""
    tried, lost = 0, 0
    for name in ("training", "profiling"):
        (tmp_path / name).mkdir()
        moments, ends, harmed = try_moments(make(name), 4, tmp_path / name, monkeypatch, protected=False)
        assert set(ends) <= {"Ended", "finished"}
        tried, lost = tried + len(moments), lost + len(harmed)
    counted(0, control=(lost, f"of {tried} lose finished steps where nobody handles the signal"), least=tried)


def wait_for(journal, size, process):
    """Until the journal has more bytes."""
    ends = time.monotonic() + 120
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
        if time.monotonic() > ends:
            process.kill()
            pytest.fail(f"{journal} did not grow beyond {size} bytes in 120 s")
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.row("R6", cheap=True)
def test_processes_that_get_the_signal_end_with_75_and_go_on(tmp_path, counted):
    """The same command with --resume gives what the undisturbed one gave, as a person types it."""
    stopping.speaking_model(tmp_path / "given", 120)
    given = ["--model", tmp_path / "given" / "model", "--questions", tmp_path / "given" / "questions.jsonl"]
    command = [sys.executable, "-m", "anabranch", "align", "generate", *given, "--batch-size", "1"]
    command += ["--set", "temperature=0.9", "--set", "budget={answer: 40}"]
    subprocess.run([*command, "--out", tmp_path / "whole.jsonl"], check=True, capture_output=True)
    codes, different, slowest = [], [], 0.0
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        journal = out.with_name(f"{out.name}.run") / "journal.jsonl"
        process = subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(journal, 300 * number, process)
        process.send_signal((signal.SIGTERM, signal.SIGUSR1)[number % 2])
        started = time.perf_counter()
        codes.append(process.wait(timeout=60))
        slowest = max(slowest, time.perf_counter() - started)
        assert 0 < journal.read_bytes().count(b"\n") < 120
        subprocess.run([*command, "--out", out, "--resume"], check=True, capture_output=True)
        different += [] if out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() else [number]
    assert codes == [75] * 2
    counted(2, len(different), note=f"the slower of 2 processes ended {slowest:.1f} s after the signal")
