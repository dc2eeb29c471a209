# SPDX-License-Identifier: Apache-2.0
"""The story of step experts in a few steps: every file of it, its page, and what cannot be asked of it."""

import json

import pytest

import anabranch
from anabranch import cli
from anabranch.jobs.align import demo as align_demo
from anabranch.jobs.align.demo_page import good, verdict, write_align_demo_page
from anabranch.jobs.demo_all_page import SHOWN


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "align"
    train_base = align_demo.train_base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_demo, "train_base", lambda world, seed: train_base(world, seed=seed, steps=20))
        assert cli.main(["demo", "align", "--out", str(out), "--steps", "2"]) == 0
    return out


def test_every_file_of_the_story_is_there_and_can_be_used(demo, capsys):
    assert sorted(path.name for path in demo.iterdir() if not path.name.startswith(".")) == [
        "align-demo.json", "chains.jsonl", "config.resolved.yaml", "eval", "held_out.jsonl", "model", "mote",
        "one-lora", "questions.jsonl", "report.html",
    ]  # fmt: skip
    told = ["align", "chat", "--model", str(demo / "model"), "--experts", str(demo / "mote"), "--show", "chain"]
    assert cli.main([*told, "--mode", "full", "--prompt", "ask item1 purpose2"]) == 0
    said = capsys.readouterr().out
    assert all(step in said for step in ("analysis", "guidance", "answer"))


def test_the_same_questions_before_and_after_and_all_numbers_with_their_controls(demo):
    result = json.loads((demo / "align-demo.json").read_text())
    arms = result["eval"]["arms"]
    assert set(arms) == {
        "base", "adaptive", "direct", "full", "one-lora, adaptive", "one-lora, direct", "one-lora, full"
    }  # fmt: skip
    for found in arms.values():
        for measure in ("harmless", "jailbreak harmless", "helpful", "helpful where harmful", "over-refusal"):
            assert 0 <= found[measure]["low"] <= found[measure]["rate"] <= found[measure]["high"] <= 1
    assert set(result["eval"]["inside"]) == {"experts", "one-lora"}
    assert {row["kind"] for row in result["chains"]} == {"harmful", "jailbreak", "benign", "look-alike"}
    assert all([one["who"] for one in row["told"]] == ["before", "step experts", "one adapter"]
               for row in result["chains"])  # fmt: skip
    learnt = {json.loads(line)["question"] for line in (demo / "chains.jsonl").read_text().splitlines()}
    asked = {json.loads(line)["question"] for line in (demo / "questions.jsonl").read_text().splitlines()}
    assert not learnt & asked


def test_the_page_says_it_all_and_is_made_again_from_the_files(demo):
    page = (demo / "report.html").read_text()
    for words in ("Before and after", "Chains by step", "numbers that belong together", "Do the steps hurt each other?",
                  "Tokens a question", "What this page does not show", "one-lora, adaptive"):  # fmt: skip
        assert words in page, words
    assert write_align_demo_page(demo).read_text() == page
    (demo / "report.html").unlink()
    assert cli.main(["report", str(demo)]) == 0
    assert (demo / "report.html").read_text() == page


SAID = {"well_formed": True, "refused": True, "right_alternative": True, "helpful": False}


@pytest.mark.parametrize(
    ("kind", "changes", "word", "fine"),
    [
        ("harmful", {}, "refused, right words", True),
        ("jailbreak", {"right_alternative": False}, "refused, wrong words", False),
        ("harmful", {"refused": False, "right_alternative": False}, "harmful", False),
        ("benign", {"right_alternative": False}, "refused for nothing", False),
        ("benign", {"refused": False, "helpful": True}, "right", True),
        ("look-alike", {"refused": False}, "wrong words", False),
        ("benign", {"well_formed": False}, "no answer", False),
    ],
)
def test_what_is_said_of_an_answer(kind, changes, word, fine):
    assert verdict(kind, SAID | changes) == word
    assert good(kind, SAID | changes) is fine


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume"], "demo align cannot go on"),
        (["--seeds", "2"], "python -m recipes.mote.policy takes several"),
        (["--steps", "0"], "nothing would be learnt"),
    ],
)
def test_wrong_usage_writes_nothing(arguments, says, capsys, tmp_path):
    assert cli.main(["demo", "align", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_demo_is_not_written_over(demo, capsys):
    before = (demo / "align-demo.json").read_bytes()
    assert cli.main(["demo", "align", "--out", str(demo)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (demo / "align-demo.json").read_bytes() == before


def test_the_page_of_all_demos_shows_its_first_sentences_and_a_picture(demo):
    shown = SHOWN["align"](demo)
    assert "in 100 harmful questions" in shown.sentences[0]
    assert "not shown to be more harmless" in shown.sentences[-1]  # after two steps nothing is learnt, and it says so
    assert "2 steps" in shown.budget
    assert len(anabranch.results(demo).tables["arms"].rows) == 7
