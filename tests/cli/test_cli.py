# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest

from anabranch import cli
from anabranch.cli.options import FileAndSet, read_yaml, settle
from anabranch.errors import UsageError
from anabranch.jobs.transfer.settings import MeasureSettings


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "anabranch", *arguments], capture_output=True, text=True, check=False)


WITHOUT_TORCH = """
import sys
from anabranch.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


def imports_torch(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode == 1 and "torch was imported" in done.stderr, done


@pytest.mark.row("U4")
def test_a_command_that_imports_torch_is_seen(counted):
    """The control: one that has to look at data before it can say what is wrong."""
    torch, _ = imports_torch("measure", "--sources", "nowhere", "--tasks", "nowhere")
    counted(0, control=(int(torch), "command that does import it is seen"))


@pytest.mark.row("U4")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["list", "--method", "specialize/mocee"],
        ["doctor"],
        ["doctor", "--help"],
        ["completion", "bash"],
        ["demo", "--help"],
        ["demo", "--seeds", "3"],
        ["measure", "--help"],
        ["measure", "--stps", "3"],
        ["measure", "--set", "learning_rate=fast"],
        ["align", "eval", "--config", "nowhere.yaml"],
    ],
)
def test_answers_without_torch(arguments):
    torch, done = imports_torch(*arguments)
    assert done.returncode == 0, done.stderr
    assert not torch


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mesure"], "did you mean measure?"),
        (["measure", "--source", "a"], "did you mean --sources"),
        (["pretrain", "--metod", "moce"], "did you mean --method?"),
        (["list", "--method", "specialize/mocee"], "did you mean specialize/moce"),
        (["measure", "--set", "learning_rat=1"], "did you mean learning_rate"),
        (["measure", "--set", "learning_rate"], "--set name=value"),
        (["measure", "--set", "learning_rate=fast"], "learning_rate cannot be used"),
        (["measure", "--config", "nowhere.yaml"], "no such file"),
    ],
)
def test_wrong_usage_says_what_to_try_and_exits_with_2(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_wrong_choice_of_a_flag():
    done = run("pretrain", "--method", "mocee")
    assert done.returncode == 2
    assert "moce" in done.stdout + done.stderr


def test_a_run_that_cannot_start_exits_with_2_and_writes_nothing(tmp_path):
    done = run(
        "measure",
        "--sources",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--tasks",
        str(tmp_path / "c"),
        "--out",
        str(tmp_path / "run"),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("models/*"))


def test_file_then_set_then_flag(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 7\nseeds: 2\nnum_labels: 50\n")
    argv = ["--config", str(file), "--set", "seeds=4", "--set", "num_draws=2", "--steps", "9"]
    from anabranch.cli.flags import parse
    from anabranch.cli.measure import Flags

    settings = settle(MeasureSettings, parse(Flags, argv, "measure"), argv)
    assert (settings.steps, settings.seeds, settings.num_labels, settings.num_draws) == (9, 4, 50, 2)
    assert settings.batch_size == MeasureSettings().batch_size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x 1\nb: *x\n", "YAML alias"),
        ("steps: 1\nsteps: 2\n", "sets 'steps' twice"),
        ("- steps\n", "holds no settings"),
        ("steps: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("steps: [1\n", "is not YAML"),
    ],
)
def test_hostile_settings_files(tmp_path, text, says):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_yaml(file)


def test_settings_are_names_and_plain_values_only():
    for assignment in ("os.system=true", "__class__=1", "steps=!!python/name:os.system ''"):
        with pytest.raises(UsageError, match=r"no setting|not YAML"):
            settle(MeasureSettings, FileAndSet(set=(assignment,)), [])


def test_a_reader_that_leaves_is_no_failure_of_ours():
    """`anabranch list | head -1`: no traceback; here the reader is gone from the start, so that it never depends."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "anabranch", "list"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_card_can_be_asked_for_with_and_without_the_flag(capsys):
    assert cli.main(["list", "specialize/moce"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("specialize/moce\n")
    assert cli.main(["list", "--method", "specialize/moce"]) == 0
    assert capsys.readouterr().out == said
