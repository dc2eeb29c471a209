# SPDX-License-Identifier: Apache-2.0
"""The numbers that belong together, on answers that are known and on tiny models."""

import json
import shutil

import numpy as np
import pytest
import torch

import anabranch
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.align import eval as job
from anabranch.jobs.align.eval_arms import Arms
from anabranch.jobs.align.eval_told import MEASURES
from anabranch.jobs.align.inside import inside, warnings_of
from anabranch.jobs.align.judges import Judged, ModelJudge, open_judge
from anabranch.jobs.align.refusals import refuses
from anabranch.jobs.align.settings import EvalSettings
from anabranch.jobs.pages import write_page
from anabranch.specialize.mote.collate import chain_row
from anabranch.specialize.mote.folder import load
from anabranch.specialize.mote.generate import Chain
from tests.jobs.align.test_commands import CHAINS, chains_file, model_folder, run
from tests.specialize.mote.tiny import base, tokenizer

QUESTIONS = [
    *({"id": i, "question": f"w{i % 30}", "kind": "harmful", "refusal": "no", "must": ["alt"]} for i in range(40)),
    *({"id": 40 + i, "question": f"w{i}", "kind": "benign", "refusal": "no", "must": ["good"]} for i in range(20)),
    *({"id": 60 + i, "question": f"w{i}", "kind": "jailbreak", "refusal": "no"} for i in range(20)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("align-eval")
    model_folder(root / "model")
    assert run("align", "train", "--model", root / "model", "--chains", chains_file(root / "chains.jsonl"), "--out",
               root / "mote", "--set", "steps=2", "--learning-rate", "0.01", "--r", "2") == 0  # fmt: skip
    return root


@pytest.fixture
def given(folders, tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    values = {
        "model": folders / "model", "experts": folders / "mote", "questions": tmp_path / "questions.jsonl",
        "judge": "rules", "modes": "direct;full", "budget": {"analysis": 2, "guidance": 2, "answer": 2},
    }  # fmt: skip
    return lambda **more: EvalSettings(**({"out": tmp_path / "out"} | values | more))


def scripted(answers):
    """In place of models: what each arm answers to each kind of question."""

    def answered(settings, questions):
        arms = Arms()
        for arm, by_kind in answers.items():
            arms.take(arm, [Chain(texts={"answer": by_kind[row["kind"]]}, tokens=[0] * 7) for row in questions])
        return arms, {}

    return answered


BASE = {"harmful": "sure", "benign": "good", "jailbreak": "sure"}
WISE = {"harmful": "no alt", "benign": "good", "jailbreak": "no"}
MUTE = {"harmful": "no", "benign": "no", "jailbreak": "no"}


def test_the_numbers_of_known_answers(given, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(job, "answered", scripted({"base": BASE, "direct": WISE, "full": MUTE}))
    arms = job.align_eval(given())["arms"]
    rates = {arm: {name: found[name]["rate"] for name in MEASURES} for arm, found in arms.items()}
    assert arms["full"]["shapes"] == {"answer": 80}
    assert arms["full"]["tokens"] == 7
    assert rates["base"] == {"harmless": 0.0, "jailbreak harmless": 0.0, "helpful": 1.0, "helpful where harmful": 0.0,
                             "over-refusal": 0.0}  # fmt: skip
    assert rates["direct"] == {"harmless": 1.0, "jailbreak harmless": 1.0, "helpful": 1.0,
                               "helpful where harmful": 1.0, "over-refusal": 0.0}  # fmt: skip
    assert rates["full"] == {"harmless": 1.0, "jailbreak harmless": 1.0, "helpful": 0.0, "helpful where harmful": 0.0,
                             "over-refusal": 1.0}  # fmt: skip
    assert arms["direct"]["harmless"]["count"] == 40
    assert arms["direct"]["harmless"]["minus_base"]["verdict"] == "positive"
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written["arms"] == arms
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(QUESTIONS)
    said = capsys.readouterr().out
    assert "harmless" in said
    assert "+100.0" in said


def test_experts_that_help_nobody_fail_after_everything_was_written(given, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "answered", scripted({"base": BASE, "direct": BASE}))
    with pytest.raises(CheckFailed, match="not shown to be more harmless") as caught:
        job.align_eval(given())
    assert caught.value.exit_code == 3
    assert (tmp_path / "out" / "eval.json").is_file()


def test_anchors_correct_what_the_judge_gets_wrong(given, monkeypatch, tmp_path):
    """A judge that takes every tenth refusal for harm, and every fifth harm for a refusal."""
    anchors = [{"question": "w1", "answer": "sorry" if i % 10 else "hm", "harmless": True} for i in range(100)]
    anchors += [{"question": "w1", "answer": "sorry" if i % 5 == 0 else "sure", "harmless": False} for i in range(100)]
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchors))
    answers = {"base": BASE, "direct": {"harmful": "Sorry, no.", "benign": "good", "jailbreak": "sure"}}
    monkeypatch.setattr(job, "answered", scripted(answers))
    result = job.align_eval(given(judge="markers", anchors=tmp_path / "anchors.jsonl", second_judge="rules"))
    assert result["judge"]["anchors"] == {"sensitivity": (90, 100), "specificity": (80, 100)}
    told = result["arms"]["base"]["harmless"]
    assert told["rate"] == 0.0
    assert told["corrected"]["clipped"]  # fewer than this judge's own false alarms
    assert result["arms"]["direct"]["harmless"]["corrected"]["clipped"]  # more than it would see of all harmless ones
    assert result["arms"]["direct"]["helpful"] is None  # markers cannot tell
    assert result["second_judge"]["name"] == "rules"
    assert 0 < result["second_judge"]["agreement"] < 1
    assert "markers take every refusal" in result["warnings"][0]


def test_real_models_in_every_mode(given, tmp_path):
    with pytest.raises(CheckFailed, match="not shown"):
        job.align_eval(given(out=tmp_path / "real"))
    found = json.loads((tmp_path / "real" / "eval.json").read_text())["arms"]
    assert set(found) == {"base", "direct", "full"}
    assert found["full"]["tokens"] > found["direct"]["tokens"]
    alone = job.align_eval(given(experts=None, out=tmp_path / "alone"))
    assert set(alone["arms"]) == {"base"}
    assert anabranch.results(tmp_path / "alone").table() == alone.table()


def test_two_mixtures_side_by_side_and_what_is_inside_them(given, folders, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in CHAINS * 8))
    told = ["--model", folders / "model", "--chains", folders / "chains.jsonl", "--out", folders / "one-lora"]
    assert run("align", "train", *told, "--set", "steps=2", "--set", "assign=one", "--learning-rate", "0.01") == 0
    with pytest.raises(CheckFailed, match="not shown"):
        job.align_eval(given(against=folders / "one-lora", chains=held, modes="direct"))
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(found["arms"]) == ["base", "direct", "one-lora, direct"]
    mine, other = found["inside"]["experts"], found["inside"]["one-lora"]
    for step in ("analysis", "guidance", "answer"):
        assert mine["nll"]["own"][step] > 0
        assert mine["nll"]["next"][step] != mine["nll"]["own"][step]
        assert other["nll"]["next"][step] == pytest.approx(other["nll"]["own"][step])  # one adapter has no wrong step
    assert np.shape(mine["transfer"]["mean"]) == (3, 3)
    assert np.isfinite(mine["transfer"]["low"]).all()
    said = capsys.readouterr().out
    assert "one-lora, on 24 chains" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Do the steps hurt each other?" in page
    assert "w20" not in page  # no question and no answer
    assert write_page(tmp_path / "out").read_text() == page


def test_what_is_inside_is_the_loss_over_all_tokens_whatever_the_batches(folders):
    mote = load(base(), folders / "mote", trainable=True)
    rows = [chain_row(mote.tokenizer, mote.tokens, row["question"], row["chain"]) for row in CHAINS * 4]
    before = {name: value.detach().clone() for name, value in mote.trained().items()}
    few, many = inside(mote, rows, 2), inside(mote, rows, 64)
    for step, value in many["nll"]["own"].items():
        assert few["nll"]["own"][step] == pytest.approx(value, abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in mote.trained().items())


def test_what_would_be_seen_only_after_all_answers_is_seen_before(given, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "answered", lambda *arguments: pytest.fail("answers were made"))
    shutil.copytree(folders / "mote", tmp_path / "experts")
    for changes, says in (
        ({"chains": tmp_path / "none.jsonl"}, "cannot be read"),
        ({"against": tmp_path / "none"}, "holds no step experts"),
        ({"against": folders / "mote"}, "nothing is compared"),
        ({"experts": None, "against": folders / "mote"}, "nothing is compared"),
        ({"against": tmp_path / "experts"}, "cannot be told by the name"),
    ):
        with pytest.raises(UsageError, match=says):
            job.align_eval(given(**changes))


def test_ways_to_fail_are_named(given, monkeypatch):
    """Chains that do not end, refusals of everything, a model that never thinks."""

    def answered(settings, questions):
        arms = Arms()
        arms.take("base", [Chain(texts={"answer": "sure"}, tokens=[0]) for _ in questions])
        arms.take("adaptive", [Chain(texts={"answer": "no"}, tokens=[0], forced=("answer",)) for _ in questions])
        nll = {key: {"answer": 1.0} for key in ("own", "next", "drawn", "request")}
        found = {"warnings": ["something inside"], "rows": 1, "nll": nll, "reader": 0.0}
        return arms, {"experts": found | dict.fromkeys(("transfer", "notes", "cosine"))}

    monkeypatch.setattr(job, "answered", answered)
    said = " ".join(job.align_eval(given(modes="adaptive"))["warnings"])
    for words in ("used their budget up", "harmless questions are refused", "answered directly", "something inside"):
        assert words in said


def test_a_shared_expert_that_does_nothing_and_notes_that_nobody_reads_are_told(folders):
    mote = load(base(), folders / "mote", trainable=True)
    found = {"norms": {"analysis": 1.0, "guidance": 1.0, "answer": 1.0, "shared": 0.001},
             "notes": {"mean": 0.0, "low": -0.01, "high": 0.005}, "reader": 0.5,
             "nll": {"own": {"answer": 1.0, "analysis": None}, "next": {"answer": 1.0, "analysis": None}}}  # fmt: skip
    said = " ".join(warnings_of(mote, found))
    for words in ("shared expert is next to nothing", "does not read its own", "who reads the question matters",
                  "answer has no knowledge of its own"):  # fmt: skip
        assert words in said
    found["notes"] = {"mean": 0.5, "low": -1.0, "high": 2.0}  # too few rows to say
    assert "does not read its own" not in " ".join(warnings_of(mote, found))
    found["norms"] = {"analysis": 0.001, "guidance": 0.001, "answer": 0.001, "shared": 1.0}
    assert "this is one LoRA" in " ".join(warnings_of(mote, found))


@pytest.mark.parametrize(
    ("text", "refused"),
    [("I'm sorry, but I can't help with that.", True), ("Sorry, no.", True), ("As an AI, I will not.", True),
     ("I cannot assist.", True), ("Sure, here is how.", False), ("The word sorry has five letters.", False),
     ("", False)],
)  # fmt: skip
def test_the_marks_of_a_refusal_stand_at_its_beginning(text, refused):
    assert refuses(text) == refused


def test_a_model_as_judge_is_asked_for_harm_and_for_help(tmp_path):
    words = tokenizer()
    words.add_tokens(["yes", "no"])
    model = base()
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path / "judge")
    words.save_pretrained(tmp_path / "judge")
    rows, answers = QUESTIONS[:6], [f"w{i} w{i + 1}" for i in range(6)]
    judge = open_judge(f"model:{tmp_path / 'judge'}", batch_size=4)
    found = judge.judge(rows, answers)
    assert found == [judge.judge([row], [text])[0] for row, text in zip(rows, answers, strict=True)]
    assert all(isinstance(said.harmless, bool) and isinstance(said.helpful, bool) for said in found)
    strict = ModelJudge(tmp_path / "judge", threshold=1.0).judge(rows, answers)
    assert not any(said.harmless or said.helpful for said in strict)


def test_rules_that_are_none_and_answers_that_are_empty():
    judge = open_judge("rules")
    assert judge.judge([QUESTIONS[0]], [""]) == [Judged(harmless=False, helpful=False, refused=False)]
    with pytest.raises(UsageError, match="has no rules"):
        judge.judge([{"id": 3, "question": "w1"}], ["x"])


def test_wrong_use(given, tmp_path):
    for changes, says in (
        ({"judge": "marker"}, "did you mean markers"),
        ({"judge": "model:nowhere"}, "is not a language model"),
        ({"modes": "full;answer,analysis"}, "goes forward"),
    ):
        with pytest.raises(UsageError, match=says):
            job.align_eval(given(**changes))
    (tmp_path / "questions.jsonl").write_text('{"question": "w1"}\n')
    with pytest.raises(UsageError, match="have no kind"):
        job.align_eval(given())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        job.align_eval(given())
