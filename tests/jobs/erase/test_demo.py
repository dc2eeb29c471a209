# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import anabranch
from anabranch import cli
from anabranch.jobs.demo_all_page import SHOWN
from anabranch.jobs.erase import demo as erase_demo
from anabranch.jobs.erase.demo_page import write_erase_demo_page
from anabranch.jobs.erase.marked_garments import SIDE
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter import apply, hashes, remove


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole story in one process, in a few steps and with a few pictures."""
    out = tmp_path_factory.mktemp("demo") / "erase"
    small = {
        "WORKERS": 1, "SAMPLES": 10, "CONTROL_SAMPLES": 4, "LOOKED_AT": 4, "ATTACK_SAMPLES": 4, "ATTACK_PICTURES": 4,
        "ATTACK_AT": (0, 1, 2), "JUDGE_STEPS": 50, "HEATED": 4,
        "REGIME": replace(erase_demo.REGIME, images=60, batch_size=8, sample_steps=2),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(erase_demo, name, value)
        assert cli.main(["demo", "erase", "--out", str(out), "--steps", "2"]) == 0
    return out


def test_numbers_carry_their_intervals_and_every_arm_its_controls(demo):
    result = json.loads((demo / "demo.json").read_text())
    assert {arm: list(rows) for arm, rows in result["arms"].items()} == {
        "before": ["none", "word"],
        "boxes": ["none", "name", "detected"],
        "shuffled": ["none", "name", "detected"],
        "name": ["none", "name", "detected"],
        "plain": ["none", "word"],
    }
    for rows in result["arms"].values():
        for row in rows.values():
            assert row["icr"]["low"] <= row["icr"]["rate"] <= row["icr"]["high"]
            assert row["icr"]["hits"] <= row["with_broken"]["hits"]
            assert row["icr"]["count"] == row["minus_before"]["count"] == 10
    assert [step for step, _ in result["curves"]["relearn"]] == [0, 1, 2]
    assert set(result["boxes_minus"]) == {"shuffled", "name", "plain"}
    assert result["regime"]["steps"] == 2


def test_the_attack_starts_from_the_erased_model(demo):
    """Step 0 is the adapter as it was written: the same pictures as in training."""
    shown, result = load_file(demo / "shown.safetensors"), json.loads((demo / "demo.json").read_text())
    erased = [bool(boxes) for boxes in result["found"]["erased"]]
    start = result["curves"]["relearn"][0][1]
    assert (start["hits"], start["count"]) == (sum(erased), len(erased))
    assert shown["row/relearn"].shape == shown["row/erased"].shape == (4, 1, SIDE, SIDE)


def test_the_adapter_goes_in_and_out_of_the_base(demo):
    pipe = open_pipeline(erase_demo.BASE)
    before = hashes(pipe)
    assert apply(pipe, demo / "adapter").policy == "detected"
    assert not torch.equal(*(next(iter(p.transformer.parameters())) for p in (pipe, open_pipeline(erase_demo.BASE))))
    remove(pipe)
    assert hashes(pipe) == before


def test_the_page_says_it_all_and_is_made_again_from_the_files(demo):
    page = (demo / "report.html").read_text()
    said = ["nobody asked for", "shuffled boxes", "the name alone", "plain fine-tuning", "Left out, and why"]
    said += ["fine-tuned on the mark", "anabranch erase sample", "never saw the mark", "phi", "no difference shown"]
    for words in said:
        assert words in page, words
    assert write_erase_demo_page(demo).read_text() == page
    assert sorted(path.name for path in demo.iterdir() if not path.name.startswith(".")) == [
        "adapter", "config.resolved.yaml", "demo.json", "mark.png", "prompts.txt", "report.html", "shown.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["erasse"], "did you mean erase?"),
        (["transfr"], "did you mean transfer?"),
        (["erase", "--resume"], "cannot go on"),
        (["erase", "--seeds", "2"], "--seeds would change nothing"),
        (["erase", "--steps", "0"], "nothing would be erased"),
    ],
)
def test_wrong_usage_writes_nothing(arguments, says, capsys, tmp_path):
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_demo_is_not_written_over(demo, capsys):
    before = (demo / "demo.json").read_bytes()
    assert cli.main(["demo", "erase", "--out", str(demo)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (demo / "demo.json").read_bytes() == before


def test_the_page_of_the_demo_is_built_again_from_its_files(demo):
    page = (demo / "report.html").read_bytes()
    (demo / "report.html").unlink()
    assert cli.main(["report", str(demo)]) == 0
    assert (demo / "report.html").read_bytes() == page


def test_the_page_of_all_demos_shows_its_first_sentences_and_a_picture(demo):
    shown = SHOWN["erase"](demo)
    assert "in 100 pictures wear a mark" in shown.sentences[0]
    assert "fine-tuned" in shown.sentences[1].lower()
    assert "2 steps of 8 pictures" in shown.budget
    assert len(anabranch.results(demo).tables["arms"].rows) == 13
