# SPDX-License-Identifier: Apache-2.0
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import anabranch
from anabranch import cli
from anabranch.errors import UsageError
from anabranch.jobs.transfer.measure import open_corpus, plan, read_cell
from anabranch.jobs.transfer.settings import MeasureSettings

OPTIONS = ["--steps", "20", "--seeds", "2", "--set", "batch_size=16", "--set", "workers=1", "--set", "num_labels=16"]
FAST = [*OPTIONS, "--set", "image_size=32", "--set", "probe_points=2"]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "transfer"
    arguments = [
        "--sources",
        str(folders / "pool/stripes"),
        str(folders / "pool/disc"),
        "--tasks",
        str(folders / "task"),
    ]
    assert cli.main(["measure", *arguments, "--out", str(out), "--leave-one-out", *FAST]) == 0
    return out


def test_files_and_numbers(run):
    result = json.loads((run / "transfer.json").read_text())
    assert result["matrix"]["rows"] == ["stripes", "disc", "all"]
    assert result["matrix"]["columns"] == ["task"]
    assert [task["task"] for task in result["tasks"]] == ["task"]
    assert np.shape(result["harm"]) == (2, 1)
    assert np.allclose(np.sum(result["relatedness"], 1), 1)
    assert all(0 <= row[0]["mean"] <= 100 for row in result["matrix"]["accuracy"])
    assert "equal-steps" in result["budget_in_words"]
    cell = json.loads((run / "models" / "all.seed-1.json").read_text())
    by_hand = np.mean(
        [
            cell["scores"]["20"]["task"]["linear"]["accuracy"],
            json.loads((run / "models/all.seed-0.json").read_text())["scores"]["20"]["task"]["linear"]["accuracy"],
        ]
    )
    assert result["matrix"]["accuracy"][2][0]["mean"] == pytest.approx(by_hand)
    assert anabranch.results(run).tables["accuracy"].rows[2][1].value == pytest.approx(by_hand)
    floor = result["curves"]["all"]["per_task"]["task"]
    assert len(floor) == 3  # before any step, and two points
    assert "Does sharing hurt?" in (run / "report.html").read_text()


def test_the_shared_model_is_a_base_for_experts(run, folders, tmp_path):
    base = run / "shared" / "seed-0"
    options = ["--base", str(base), "--steps", "4", "--experts", "2", "--clusters", "4", "--set", "batch_size=16"]
    assert cli.main(["pretrain", "--images", str(folders / "pool"), "--out", str(tmp_path / "run"), *options]) == 0


def test_report_is_built_again_from_a_part_of_the_run(run, capsys):
    (run / "report.html").unlink()
    hidden = (run / "transfer.json").rename(run / "hidden.json")
    assert cli.main(["report", str(run)]) == 0
    assert "unfinished" in (run / "report.html").read_text()
    hidden.rename(run / "transfer.json")
    assert cli.main(["report", str(run)]) == 0
    assert "verdict" in (run / "report.html").read_text()
    assert cli.main(["report", str(run.parent)]) == 2
    assert "not a run" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, folders, tmp_path):
    arguments = [
        "--sources",
        str(folders / "pool/stripes"),
        str(folders / "pool/disc"),
        "--tasks",
        str(folders / "task"),
    ]
    options = [o if o != "workers=1" else "workers=2" for o in FAST]
    assert cli.main(["measure", *arguments, "--out", str(tmp_path / "run"), *options]) == 0
    one, two = (json.loads((folder / "transfer.json").read_text()) for folder in (run, tmp_path / "run"))
    assert one["matrix"] == two["matrix"]


def test_a_stopped_measurement_goes_on_where_it_was(folders, tmp_path):
    arguments = [
        "--sources",
        str(folders / "pool/stripes"),
        str(folders / "pool/disc"),
        "--tasks",
        str(folders / "task"),
    ]
    command = [sys.executable, "-m", "anabranch", "measure", *arguments, "--out", str(tmp_path / "run"), *FAST]
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    models, deadline = tmp_path / "run" / "models", time.monotonic() + 120
    while not list(models.glob("*.json")) and time.monotonic() < deadline:
        started.poll()
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == 75
    kept = {path: path.stat().st_mtime_ns for path in models.glob("*.json")}
    assert kept
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_budgets(folders):
    base = {"sources": (str(folders / "pool/stripes"), "patchwork:digits"), "tasks": (str(folders / "task"),)}

    def cells(budget, **options):
        settings = MeasureSettings(**base, steps=100, batch_size=60, seeds=1, budget=budget, image_size=32, **options)
        return {cell.model: cell for cell in plan(settings, open_corpus(settings))}

    equal = cells("equal-steps")
    assert {(c.steps, c.batch_size) for c in equal.values()} == {(100, 60)}
    epochs = cells("equal-epochs")  # 60 and 2,000 images
    assert [epochs[m].steps for m in ("stripes", "all") if m in epochs][-1] == 200
    assert epochs["digits"].steps == round(100 * 2000 / 1030)
    images = cells("equal-images")
    assert (images["all"].images_a_source, images["digits"].images_a_source) == (30, 60)
    exposure = cells("equal-exposure", leave_one_out=True)  # an image is seen as often by its own model as by all
    assert (exposure["all"].batch_size, exposure["digits"].batch_size) == (60, round(60 * 2000 / 2060))
    assert exposure["without-digits"].members == (0,)


def test_a_folder_that_is_source_and_task_never_learns_from_its_test_images(folders):
    both = str(folders / "task")
    settings = MeasureSettings(sources=(both, str(folders / "pool")), tasks=(both,), image_size=32)
    corpus = open_corpus(settings)
    learned = set(corpus.sources[0].files)
    tested = {file for file, test in zip(corpus.tasks[0].files, corpus.tasks[0].is_test.tolist(), strict=True) if test}
    assert learned
    assert tested
    assert not learned & tested
    assert corpus.own == (0,)


def test_spellings_of_one_folder_and_folders_inside_each_other(folders):
    task, pool = str(folders / "task"), str(folders / "pool")
    corpus = open_corpus(
        MeasureSettings(sources=(task + "/../task/", pool), tasks=(task,), image_size=32, max_images=20)
    )
    learned = set(corpus.sources[0].files)
    tests = corpus.tasks[0]
    assert len(tests) == 20
    assert not learned & {file for file, test in zip(tests.files, tests.is_test.tolist(), strict=True) if test}
    with pytest.raises(UsageError, match="overlap"):
        open_corpus(MeasureSettings(sources=(task + "/disc", pool), tasks=(task,), image_size=32))


def test_cells_of_other_settings_are_not_taken_over(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"made_with": {"steps": 5}, "score": 1}))
    assert read_cell(tmp_path / "a.json", {"steps": 5}) == {"score": 1}
    with pytest.raises(UsageError, match="others in steps"):
        read_cell(tmp_path / "a.json", {"steps": 6})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sources", "patchwork:digits", "--tasks", "patchwork:digits"], "too few sources"),
        (["--sources", "patchwork:digits", "patchwork:digits", "--tasks", "patchwork:digits"], "called 'digits'"),
        (["--sources", "patchwork:digits", "patchwork:garments"], "too few tasks"),
        (["--sources", "patchwork:digit", "patchwork:garments", "--tasks", "patchwork:digits"], "did you mean digits"),
        (
            ["--sources", "patchwork:digits", "patchwork:garments", "--tasks", "patchwork:digits", "--seeds", "0"],
            "seeds is",
        ),
    ],
)
def test_wrong_requests(arguments, says, tmp_path, capsys):
    assert cli.main(["measure", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
