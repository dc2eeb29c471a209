# SPDX-License-Identifier: Apache-2.0
"""`anabranch report` on the folder of a training: its page, finished or not, from its files alone."""

import json

import pytest

from anabranch import cli
from anabranch.errors import WRONG_USAGE

LINES = [{"step": step, "loss": 4 / step, "balance": 0.5, "learning_rate": 1e-3} for step in (50, 100)]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "training").mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text("model: <b>mine</b>\nseed: 7\nsteps: 100\nbase: null\n")
    (folder / "training" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def test_a_finished_training_has_its_losses_terms_and_settings(run):
    (run / "mote.json").write_text("{}")
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Loss 0.08 at step 50, 0.04 at step 100." in page
    assert "unfinished" not in page
    assert "Balance" in page
    assert "&lt;b&gt;mine" in page
    assert "<b>mine" not in page


@pytest.mark.parametrize(("kept", "said"), [(1, "Loss 0.08 at step 50."), (0, "No step is told of yet.")])
def test_a_stopped_one_says_so_and_how_to_go_on(run, kept, said):
    (run / "training" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:kept]))
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert said in page
    assert "unfinished" in page
    assert "--resume" in page


@pytest.mark.parametrize("text", ["[1, 2", "7", None])
def test_what_cannot_be_read_is_wrong_usage(run, text, capsys):
    config = run / "config.resolved.yaml"
    config.unlink() if text is None else config.write_text(text)
    assert cli.main(["report", str(run)]) == WRONG_USAGE
    assert "cannot be read" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_another_folder_is_no_run(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == WRONG_USAGE
    assert "is not a run of anabranch" in capsys.readouterr().err
