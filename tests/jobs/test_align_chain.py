# SPDX-License-Identifier: Apache-2.0
"""`align chain` on a tiny model: what is written, resumed, refused."""

import json

import pytest

from anabranch.errors import Stopped, UsageError
from anabranch.jobs import align_chain as job
from anabranch.jobs.align_settings import ChainSettings
from anabranch.train.signals import StopFlag
from tests.jobs.test_align import model_folder, run

PROMPTS = {"yes": ["w1"], "no": ["w2"], "check": "{question} w9 {answer}", "write_analysis": "{question} w30",
           "after_analysis": "{question} {analysis}", "write_guidance": "{question} {analysis} w31",
           "after_guidance": "{question} {analysis} {guidance}"}  # fmt: skip
QUESTIONS = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "kind": "harmful" if i % 2 else "benign"} for i in range(10)]


@pytest.fixture
def given(tmp_path):
    model_folder(tmp_path / "model")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    values = {
        "model": tmp_path / "model", "questions": tmp_path / "questions.jsonl",
        "prompts_file": tmp_path / "prompts.json", "batch_size": 4, "analysis_tokens": 3, "guidance_tokens": 3, "answer_tokens": 4, "retries": 1,
    }  # fmt: skip
    return lambda name="chains.jsonl", **more: ChainSettings(out=tmp_path / name, **(values | more))


def test_every_question_is_counted_and_kept_chains_can_be_trained_on(given, tmp_path, capsys):
    report = job.align_chain(given(threshold=0.49))
    rows = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert report["attempted"] == 10 == report["kept"] + report["dropped"]
    assert len(rows) == report["kept"] == sum(report["shapes"].values()) > 0
    assert all(list(row["chain"])[-1] == "answer" and row["check"] > 0.49 for row in rows)
    assert all("guidance" not in row["chain"] or "analysis" in row["chain"] for row in rows)
    assert report["by_kind"]["harmful"]["attempted"] == 5
    assert json.loads((tmp_path / "chain_report.json").read_text()) == report
    assert not list(tmp_path.glob(".chains*"))
    assert "judged by the model itself" in capsys.readouterr().out
    assert run("align", "train", "--model", tmp_path / "model", "--chains", tmp_path / "chains.jsonl", "--out",
               tmp_path / "mote", "--set", "steps=2", "--learning-rate", "0.01", "--r", "2") == 0  # fmt: skip


def test_a_stopped_build_goes_on_to_the_same_bytes(given, tmp_path, monkeypatch):
    job.align_chain(given("whole.jsonl"))
    seen = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "is_set", property(lambda self: next(seen)))
        with pytest.raises(Stopped):
            job.align_chain(given("parts.jsonl"))
    part = tmp_path / ".parts.jsonl.part"
    assert len(part.read_text().splitlines()) == 4
    part.write_text(part.read_text() + '{"id": "q4", "half')  # a line that the power cut off
    with pytest.raises(UsageError, match="holds a build that was stopped"):
        job.align_chain(given("parts.jsonl"))
    with pytest.raises(UsageError, match="not what this run began with"):
        job.align_chain(given("parts.jsonl", seed=1, resume=True))
    job.align_chain(given("parts.jsonl", resume=True))
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_model_that_never_passes_is_told(given, tmp_path, capsys):
    report = job.align_chain(given(threshold=0.999))
    assert (report["kept"], report["dropped"]) == (0, 10)
    assert "nothing to train on" in capsys.readouterr().out
    easy = job.align_chain(given("easy.jsonl", threshold=0.0))
    assert easy["shapes"] == {"answer": 10}
    assert "says yes to anything" in easy["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "batch_size is too small"),
        ({"retries": -1}, "retries, threshold, temperature"),
        ({"threshold": 1.0}, "retries, threshold, temperature"),
        ({"text": ""}, "holds no questions"),
        ({"text": '{"question": "w1 <|analysis|>"}'}, "holds <|analysis|>"),
        ({"prompts": "{"}, "cannot be read"),
        ({"prompts": "[]"}, "holds no prompts"),
        ({"prompts": '{"check": "x"}'}, "leaves out"),
    ],
)
def test_what_cannot_be_built_says_why(changes, says, given, tmp_path):
    changes = dict(changes)
    if "text" in changes:
        (tmp_path / "questions.jsonl").write_text(changes.pop("text"))
    if "prompts" in changes:
        (tmp_path / "prompts.json").write_text(changes.pop("prompts"))
    with pytest.raises(UsageError, match=says.replace("|", r"\|")):
        job.align_chain(given(**changes))
    assert not (tmp_path / "chains.jsonl").exists()


def test_an_earlier_result_is_not_lost(given, tmp_path):
    (tmp_path / "chains.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="is there already"):
        job.align_chain(given())
    assert (tmp_path / "chains.jsonl").read_text() == "mine\n"
