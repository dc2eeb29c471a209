# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import yaml

from anabranch.errors import UsageError
from anabranch.train.run_folder import RunFolder, differing_keys

CONFIG = {"method": "moce", "train": {"steps": 100, "betas": (0.9, 0.95), "learning_rate": 1e-5}, "data": None}


def test_a_new_run_holds_its_configuration_and_can_be_resumed_with_it(tmp_path):
    with RunFolder.open(tmp_path / "deep" / "run", CONFIG) as run:
        assert run.path == tmp_path / "deep" / "run"
    written = yaml.safe_load((run.path / "config.resolved.yaml").read_text())
    assert written == {**CONFIG, "train": {**CONFIG["train"], "betas": [0.9, 0.95]}}
    RunFolder.open(run.path, CONFIG, resume=True).close()


def test_an_existing_run_is_only_opened_to_resume(tmp_path):
    RunFolder.open(tmp_path / "run", CONFIG).close()
    with pytest.raises(UsageError, match=r"already holds a run\n  try: --resume to go on with it, or another --out"):
        RunFolder.open(tmp_path / "run", CONFIG)


def test_resuming_with_other_values_names_the_first_that_differ(tmp_path):
    RunFolder.open(tmp_path / "run", CONFIG).close()
    other = {"method": "moce", "train": {**CONFIG["train"], "steps": 200}, "data": None, "seed": 1}
    with pytest.raises(
        UsageError, match=r"expected: seed: None; train.steps: 100\n  received: seed: 1; train.steps: 200"
    ):
        RunFolder.open(tmp_path / "run", other, resume=True)


def test_differing_keys_tell_missing_from_none():
    assert differing_keys({"a": None, "b": {"c": 1}}, {"b": {"c": 1, "d": 2}}) == ["a", "b.d"]


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    with (
        RunFolder.open(tmp_path / "run", CONFIG),
        pytest.raises(UsageError, match=rf"in use by process {os.getpid()}\n"),
    ):
        RunFolder.open(tmp_path / "run", CONFIG, resume=True)
    RunFolder.open(tmp_path / "run", CONFIG, resume=True).close()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"is not a run\n(.|\n)*received: thesis.tex"):
            RunFolder.open(tmp_path, CONFIG, resume=resume)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.open(tmp_path / "thesis.tex", CONFIG)
    with pytest.raises(UsageError, match=r"cannot write a run to(.|\n)*Not a directory"):
        RunFolder.open(tmp_path / "thesis.tex" / "run", CONFIG)


@pytest.mark.parametrize("leftovers", [[], [".lock"], [".lock", ".config.resolved.yaml.new"]])
def test_a_run_that_died_while_it_was_created_starts_anew(tmp_path, leftovers):
    run = tmp_path / "run"
    run.mkdir()
    for name in leftovers:
        (run / name).write_text("half")
    with pytest.raises(UsageError, match="nothing to resume"):
        RunFolder.open(run, CONFIG, resume=True)
    RunFolder.open(run, CONFIG).close()
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["method"] == "moce"


def test_nothing_to_resume_where_there_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="there is no run"):
        RunFolder.open(tmp_path / "nowhere", CONFIG, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "!!python/object/apply:os.system ['false']", "\x00"])
def test_a_damaged_configuration_is_an_error_in_words(tmp_path, text):
    RunFolder.open(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "config.resolved.yaml").write_text(text)
    with pytest.raises(UsageError, match="is not valid YAML"):
        RunFolder.open(tmp_path / "run", CONFIG, resume=True)


def test_only_the_first_process_of_a_launcher_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        assert not Path(run.path).exists()
