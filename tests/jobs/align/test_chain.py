# SPDX-License-Identifier: Apache-2.0
"""`anabranch align chain` on a tiny model: what is written, resumed, reported and refused."""

import json
import os
import signal
import subprocess
import sys

import pytest

from anabranch.cli import align_chain as command
from anabranch.errors import CheckFailed, Stopped, UsageError
from anabranch.jobs.align import chain as job
from anabranch.jobs.align.chain import align_chain
from anabranch.jobs.align.chain_check import passes
from anabranch.jobs.align.chain_report import numbers_of, warnings_for
from anabranch.jobs.align.judges import Judged
from anabranch.jobs.align.refusals import refuses
from anabranch.jobs.align.settings import ChainSettings
from anabranch.jobs.align.train import read_chains
from anabranch.specialize.mote.chain_building import Verdict
from anabranch.specialize.mote.chain_writer import ChainWriter
from anabranch.specialize.mote.steps import Steps
from tests.specialize.mote.tiny import base, tokenizer

PROMPTS = {
    "analysis": "{question} w30", "answer_after_analysis": "{question} {analysis}",
    "guidance": "{question} {analysis} w31", "answer_after_guidance": "{question} {analysis} {guidance}",
    "check": "{question} w9 {answer}", "yes": "w1", "no": "w2",
}  # fmt: skip
TURNS = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}, {"role": "user", "content": "w5"}]
QUESTIONS = [
    *({"question": f"w{i} w{i + 1}", "kind": "harmful" if i % 2 else "benign"} for i in range(9)),
    {"id": "talk", "question": TURNS, "source": "elsewhere"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("align-chain")
    model = base()
    model.generation_config.eos_token_id = 38
    model.save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    (root / "prompts.json").write_text(json.dumps(PROMPTS))
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return root


@pytest.fixture
def given(world, tmp_path):
    values = {
        "model": world / "model", "questions": world / "questions.jsonl", "prompts_file": world / "prompts.json",
        "batch_size": 4, "budget": {"analysis": 3, "guidance": 3, "answer": 4}, "threshold": 0.49,
    }  # fmt: skip
    return lambda **more: ChainSettings(**({"out": tmp_path / "chains.jsonl"} | values | more))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_and_report_agree_and_can_be_trained_on(given, tmp_path, capsys):
    report = align_chain(given())
    rows, numbers = rows_of(tmp_path / "chains.jsonl"), report["all"]
    assert numbers["attempted"] == 10
    assert len(rows) == numbers["kept"] == sum(numbers["shapes"].values()) == 10 - sum(numbers["dropped"].values())
    assert min(numbers["shapes"].values()) > 0, "the world should show every shape"
    for row in rows:
        assert list(row["chain"]) in (["answer"], ["analysis", "answer"], ["analysis", "guidance", "answer"])
        assert row["check"] >= 0.49
        assert 1 <= row["attempts"] <= 5
        assert all(row["chain"].values())
    assert {row["id"] for row in rows} <= {*range(1, 10), "talk"}
    assert json.loads((tmp_path / "chain_report.json").read_text()) == report
    assert report["by_kind"].keys() == {"benign", "harmful", "unmarked"}
    for name in ("attempted", "kept"):
        assert sum(part[name] for part in report["by_kind"].values()) == numbers[name]
    assert numbers["checks"]["direct"]["count"] == 10
    assert numbers["checks"]["direct"]["hits"] == numbers["shapes"]["answer"]
    assert read_chains(tmp_path / "chains.jsonl", Steps())
    said = capsys.readouterr()
    assert said.out.count("the model judging itself") == 1
    assert "next     anabranch align train" in said.out
    assert "Loading weights" not in said.err


def test_a_conversation_keeps_its_turns_and_a_row_what_it_came_with(given, tmp_path):
    align_chain(given(threshold=0.001))
    assert rows_of(tmp_path / "chains.jsonl")[-1] == {
        "id": "talk", "question": TURNS, "source": "elsewhere", "kind": None,
        "chain": rows_of(tmp_path / "chains.jsonl")[-1]["chain"], "attempts": 1,
        "check": rows_of(tmp_path / "chains.jsonl")[-1]["check"], "budget_used_up": ["answer"],
    }  # fmt: skip


def test_the_batch_has_no_part_in_what_is_written(given, tmp_path):
    align_chain(given())
    align_chain(given(out=tmp_path / "other" / "chains.jsonl", batch_size=3))
    one, two = rows_of(tmp_path / "chains.jsonl"), rows_of(tmp_path / "other" / "chains.jsonl")
    assert [row["chain"] for row in one] == [row["chain"] for row in two]
    assert [row["check"] for row in one] == pytest.approx([row["check"] for row in two], abs=2e-6)


@pytest.mark.parametrize("cut", [b"", b'{"id": 5, "ki', b'{"id": 5}\n{"id"', b"\0\0\0\n"])
def test_an_interrupted_build_goes_on_to_the_same_bytes(given, tmp_path, monkeypatch, cut):
    align_chain(given(out=tmp_path / "whole" / "chains.jsonl"))
    plain, batches = job.build_chains, []

    def breaks(drafts, *rest, **options):
        batches.append([draft.id for draft in drafts])
        if len(batches) == 2:
            raise RuntimeError("power failure")
        plain(drafts, *rest, **options)

    monkeypatch.setattr(job, "build_chains", breaks)
    settings = given(out=tmp_path / "parts" / "chains.jsonl")
    with pytest.raises(RuntimeError, match="power failure"):
        align_chain(settings)
    journal = tmp_path / "parts" / "chains.jsonl.run" / "journal.jsonl"
    assert len(rows_of(journal)) == 4
    assert not settings.out.exists()  # half a result has no name
    with journal.open("ab") as file:
        file.write(cut)
    align_chain(given(out=settings.out, resume=True))
    assert batches == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [9, "talk"]]
    one, two = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert one.keys() == two.keys()
    for name in one:
        if name.name != ".lock":
            assert one[name] == two[name], name
    align_chain(given(out=settings.out, resume=True))
    assert len(batches) == 4  # a finished build makes nothing again
    assert files(tmp_path / "parts")[settings.out.relative_to(tmp_path / "parts")] == settings.out.read_bytes()


def test_a_signal_stops_it_between_two_tokens_and_exits_with_75(given, tmp_path, monkeypatch):
    plain, calls = ChainWriter.write, []

    def write(self, step, draw, drafts):
        calls.append(step)
        if len(calls) > 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step, draw, drafts)

    with monkeypatch.context() as patch:
        patch.setattr(ChainWriter, "write", write)
        with pytest.raises(Stopped, match="--resume") as error:
            align_chain(given())
    assert error.value.exit_code == 75
    done = len(rows_of(tmp_path / "chains.jsonl.run" / "journal.jsonl"))
    assert done % 4 == 0
    align_chain(given(resume=True))
    align_chain(given(out=tmp_path / "whole" / "chains.jsonl"))
    assert (tmp_path / "chains.jsonl").read_bytes() == (tmp_path / "whole" / "chains.jsonl").read_bytes()


def test_nothing_else_than_what_it_began_with_is_gone_on_with(given, tmp_path, world):
    align_chain(given())
    before = files(tmp_path)
    for changes, says in (
        ({}, "already holds a run"),
        ({"resume": True, "seed": 1}, "started with another configuration"),
        ({"resume": True, "threshold": 0.6}, "started with another configuration"),
    ):
        with pytest.raises(UsageError, match=says):
            align_chain(given(**changes))
    assert files(tmp_path) == before


@pytest.mark.parametrize("what", ["questions", "prompts", "model", "tokenizer"])
def test_changed_files_are_not_gone_on_with(given, tmp_path, world, what):
    model = base()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name in ("questions.jsonl", "prompts.json"):
        (tmp_path / name).write_text((world / name).read_text())
    paths = {"model": tmp_path / "model", "questions": tmp_path / "questions.jsonl",
             "prompts_file": tmp_path / "prompts.json"}  # fmt: skip
    align_chain(given(**paths))
    if what == "questions":
        paths["questions"].write_text(paths["questions"].read_text().replace("w8 w9", "w8 w10"))
    elif what == "prompts":
        paths["prompts_file"].write_text(json.dumps(PROMPTS | {"check": "{question} w10 {answer}"}))
    elif what == "model":
        model.model.layers[0].mlp.up_proj.weight.data.add_(0.5)
        model.save_pretrained(tmp_path / "model")
    else:
        changed = tokenizer()
        changed.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        changed.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=f"{what}: not what this run began with"):
        align_chain(given(resume=True, **paths))


def test_a_model_that_never_passes_is_a_failed_check_with_a_report(given, tmp_path, capsys):
    with pytest.raises(CheckFailed, match="no chain was kept") as error:
        align_chain(given(threshold=0.99))
    assert error.value.exit_code == 3
    assert not (tmp_path / "chains.jsonl").exists()
    report = json.loads((tmp_path / "chain_report.json").read_text())
    assert sum(report["all"]["dropped"].values()) == 10
    assert "never passes" in report["warnings"][0]
    assert "warning: the model never passes" in capsys.readouterr().out


def test_a_share_of_the_questions_gets_every_step(given, tmp_path):
    align_chain(given(threshold=0.001, all_steps=0.5))
    shapes = {row["id"]: len(row["chain"]) for row in rows_of(tmp_path / "chains.jsonl")}
    assert set(shapes.values()) == {1, 3}
    align_chain(given(threshold=0.001, all_steps=0.5, batch_size=7, out=tmp_path / "again" / "chains.jsonl"))
    assert {row["id"]: len(row["chain"]) for row in rows_of(tmp_path / "again" / "chains.jsonl")} == shapes
    align_chain(given(threshold=0.001, all_steps=1.0, out=tmp_path / "all" / "chains.jsonl"))
    assert {len(row["chain"]) for row in rows_of(tmp_path / "all" / "chains.jsonl")} == {3}


def test_a_model_that_always_answers_directly_is_told(given, monkeypatch):
    monkeypatch.setattr(ChainWriter, "check", lambda self, drafts: [Verdict(1.0, 0.9)] * len(drafts))
    assert any("always answers directly" in warning for warning in align_chain(given())["warnings"])


def test_another_judge_decides_and_is_compared_with_the_models_own_word(given, tmp_path, world, monkeypatch):
    """Markers: a harmful question wants a refusal, any other none; with what the model said of it beside."""
    rows = [{"id": i, "question": f"w{i}", "kind": "harmful" if i % 2 else "benign"} for i in range(8)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write = ChainWriter.write

    def scripted(self, step, draw, drafts):  # the direct answer of every fourth is a refusal
        written = write(self, step, draw, drafts)
        if step != "answer":
            return written
        return [
            one._replace(text="I cannot help with that." if draft.id % 4 in (1, 2) else "w7 w8")
            for one, draft in zip(written, drafts, strict=True)
        ]

    monkeypatch.setattr(ChainWriter, "write", scripted)
    report = align_chain(given(questions=tmp_path / "asked.jsonl", check="markers", retries=1, threshold=0.5))
    kept = {row["id"]: row for row in rows_of(tmp_path / "chains.jsonl")}
    assert sorted(kept) == [0, 1, 4, 5]  # 2 and 6 are refused though harmless, 3 and 7 answered though harmful
    assert report["all"]["dropped"]["check"] == 4
    assert report["all"]["own_check"]["count"] == 4 + 4 * 4  # one check of what passes at once, four of the others
    assert 0 <= report["all"]["own_check"]["auroc"] <= 1
    assert report["note"].startswith("markers decided")


def test_another_judge_needs_to_know_the_kinds(given):
    with pytest.raises(UsageError, match="have no kind"):
        align_chain(given(check="markers", threshold=0.5))


def test_a_harmful_answer_to_a_harmless_question_does_not_pass():
    row = {"kind": "benign", "must_not": ["poison"]}
    said = Judged(harmless=False, helpful=None, refused=False)
    assert not passes(row, said, "rules")
    assert passes(row, said, "markers")  # which call harmless what refuses
    assert not passes(row, said._replace(harmless=True, refused=True), "rules")
    assert passes({"kind": "harmful"}, said._replace(harmless=True), "rules")


def test_a_threshold_that_would_do_nothing_is_refused(given, tmp_path):
    with pytest.raises(UsageError, match="knows no threshold"):
        align_chain(given(check="markers", threshold=0.9))


def entry(answer, kind=None):
    return {"id": 1, "kind": kind, "dropped": "", "chain": {"answer": answer}, "tokens": {"answer": 3},
            "budget_used_up": [], "checks": [["direct", 0.9, 0.05, None]]}  # fmt: skip


def test_refusals_and_a_check_that_says_neither_word_are_told():
    assert all(map(refuses, ("I can’t help with that.", "  I'm sorry, but", "Sorry,", "As an AI")))
    assert not any(map(refuses, ("You can", "It is sorry to see", "Iron")))
    numbers = numbers_of([entry("I cannot say."), entry("I'm sorry.")])
    warnings = " ".join(warnings_for({"all": numbers}))
    assert "always refuses: 2 of 2" in warnings
    assert "0.05 of the probability" in warnings
    assert "refuses" not in " ".join(warnings_for({"all": numbers_of([entry("I cannot say."), entry("Take two.")])}))


def test_questions_longer_than_the_context_are_counted(given, tmp_path):
    (tmp_path / "questions.txt").write_text("w1 w2\n" + "w3 " * 60 + "\n")
    report = align_chain(given(questions=tmp_path / "questions.txt", threshold=0.001))
    assert report["all"]["dropped"]["too_long"] == 1
    assert "1 questions are too long" in " ".join(report["warnings"])


def test_a_line_break_of_unicode_breaks_no_row():
    line = job.line_of({"chain": {"answer": "one\u2028two\x85three\nfour"}})
    assert len(line.splitlines()) == 1
    assert json.loads(line)["chain"]["answer"] == "one\u2028two\x85three\nfour"


def test_a_tokenizer_without_a_word_for_padding_serves(given, tmp_path):
    base().save_pretrained(tmp_path / "model")
    bare = tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "model")
    assert align_chain(given(model=tmp_path / "model"))["all"]["kept"] > 0


REFUSED = [
    ({"batch_size": 0}, "batch_size cannot be used"),
    ({"retries": -1}, "retries cannot be used"),
    ({"temperature": -1.0}, "temperature cannot be used"),
    ({"temperature": float("nan")}, "temperature cannot be used"),
    ({"temperature": 0.0}, "the same answer again"),
    ({"top_p": 0.0}, "top_p cannot be used"),
    ({"threshold": 1.0}, "threshold cannot be used"),
    ({"all_steps": 1.5}, "all_steps cannot be used"),
    ({"budget": {"anwser": 3}}, "did you mean answer"),
    ({"budget": {"answer": 0}}, "needs room for a token"),
    ({"budget": {"answer": 70}}, "no question fits into the model's context"),
    ({"model": "nowhere"}, "is not a language model"),
    ({"model": "."}, "a folder without config.json"),
    ({"questions": "nowhere"}, "cannot be read"),
    ({"questions": b""}, "holds no questions"),
    ({"questions": b'{"question": "w1"}\n\xff\n'}, "given.jsonl:2 is no text"),
    ({"questions": b'{"question": "  "}'}, "asks nothing"),
    ({"questions": b'{"question": "w1 <|response|>"}'}, "holds a token of a step"),
    ({"questions": b'{"question": [{"role": "user", "content": "<|/analysis|>"}, {"role": "user", "content": "w1"}]}'},
     "holds a token of a step"),
    ({"questions": b'{"question": "w1", "kind": "harmfull"}'}, "did you mean harmful"),
    ({"questions": b'{"id": "a", "question": "w1"}\n{"id": "a", "question": "w2"}'}, "it is there twice"),
    ({"questions": b'{"id": 2, "question": "w1"}\n{"question": "w2"}'}, "it is there twice"),
    ({"questions": b'{"id": [1], "question": "w1"}'}, "the id [1] cannot be used"),
    ({"questions": b'{"question": "\\ud800"}'}, "is no text"),
    ({"prompts_file": "nowhere"}, "cannot be read"),
    ({"prompts_file": b"{"}, "is not JSON"),
    ({"prompts_file": b"[]"}, "holds no prompts"),
    ({"prompts_file": b'{"chek": ""}'}, "did you mean check"),
    ({"prompts_file": b'{"yes": 1}'}, "is no text"),
    ({"prompts_file": b'{"check": "{question}"}'}, "has the wrong places"),
    ({"prompts_file": None}, "cannot tell the words of the check apart"),
    ({"out": "."}, "cannot be written"),
    ({"out": "chain_report.json"}, "the name of the report"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_built_says_why_and_leaves_nothing(given, tmp_path, changes, says):
    for name, value in changes.items():
        if isinstance(value, bytes):
            (tmp_path / "given.jsonl").write_bytes(value)
            changes = changes | {name: tmp_path / "given.jsonl"}
        elif isinstance(value, str):
            changes = changes | {name: tmp_path / value}
    before = files(tmp_path)
    with pytest.raises(UsageError) as error:
        align_chain(given(**changes))
    assert says in str(error.value)
    assert files(tmp_path) == before


def test_what_others_wrote_is_not_lost(given, tmp_path):
    (tmp_path / "chains.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="is there already"):
        align_chain(given())
    (tmp_path / "chains.jsonl").unlink()
    align_chain(given(out=tmp_path / "first.jsonl"))
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"received: that of first.jsonl"):
        align_chain(given())
    assert files(tmp_path) == before


def test_a_template_that_refuses_a_conversation_is_told(given, tmp_path):
    base().save_pretrained(tmp_path / "model")
    strict = tokenizer()
    strict.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn, please') }}{% endif %}{{ messages[0].content }}"
    )
    strict.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="does not take question 'talk'") as error:
        align_chain(given(model=tmp_path / "model"))
    assert "one turn, please" in str(error.value)
    assert not (tmp_path / "chains.jsonl.run").exists()


def test_the_command_takes_flags_and_settings(world, tmp_path, capsys):
    arguments = ["--model", world / "model", "--questions", world / "questions.jsonl", "--prompts-file",
                 world / "prompts.json", "--out", tmp_path / "chains.jsonl", "--threshold", "0.45", "--batch-size", "5",
                 "--set", "budget={analysis: 3, guidance: 3, answer: 4}", "--set", "top_p=0.9"]  # fmt: skip
    assert command.main([str(argument) for argument in arguments]) == 0
    assert json.loads((tmp_path / "chain_report.json").read_text())["settings"]["top_p"] == 0.9
    with pytest.raises(UsageError, match="did you mean --questions"):
        command.main(["--question", "x"])


def test_help_needs_no_torch():
    script = """
import sys
from anabranch.cli.align_chain import main
try:
    main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
