# SPDX-License-Identifier: Apache-2.0
"""Completion as a shell asks for it: the script is sourced, the words of a line are given, the offers are read."""

import shutil
import subprocess
from dataclasses import fields
from importlib import import_module

import pytest

from anabranch import cli
from anabranch.cli import COMMANDS
from anabranch.cli.completion import places
from anabranch.jobs.settings import DEMOS
from anabranch.registry import cards

QUESTIONS = {
    ("",): COMMANDS,
    ("mea",): ["measure"],
    ("erase", ""): ["scan", "train", "sample", "eval", "bake"],
    ("align", "e"): ["eval", "export"],
    ("erase", "train"): ["train"],
    ("demo", ""): ["all", *DEMOS],
    ("measure", "--ob"): ["--objective"],
    ("measure", "--objective", ""): ["mae", "simsiam", "byol"],
    ("measure", "--objective", "=", "s"): ["simsiam"],
    ("measure", "--set", "learning"): ["learning_rate="],
    ("measure", "--steps", ""): [],
    ("measure", "--out", "pic"): ["pictures of birds"],
    ("report", "pic"): ["pictures of birds"],
    ("erase", "eval", "--second-d"): ["--second-detector"],
    ("align", "eval", "--second-d"): [],
    ("experts", "rank", "--target"): ["--target"],
    ("list", "--method", "specialize/mo"): [key for key in cards() if key.startswith("specialize/mo")],
    ("completion", "z"): ["zsh"],
}


def script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_offers_what_can_follow(tmp_path, capsys):
    (tmp_path / "pictures of birds").mkdir()
    lines = [script("bash", capsys), "ask() { COMP_WORDS=(anabranch \"$@\"); COMP_CWORD=$#; _anabranch; "
             "for word in \"${COMPREPLY[@]}\"; do printf '%s|' \"$word\"; done; echo; }"]  # fmt: skip
    for words in QUESTIONS:
        lines.append("ask " + " ".join(f"'{word}'" for word in words))
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stderr == ""
    offered = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    assert dict(zip(QUESTIONS, offered, strict=True)) == {words: list(known) for words, known in QUESTIONS.items()}


@pytest.mark.parametrize(("shell", "check"), [("bash", ["-n"]), ("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_the_shell_can_read_its_script(shell, check, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    file = tmp_path / "script"
    file.write_text(script(shell, capsys))
    subprocess.run([shell, *check, str(file)], check=True)


def test_every_command_topic_and_flag_has_its_place():
    known = {place.words: place for place in places()}
    for command in COMMANDS:
        topics = getattr(import_module(f"anabranch.cli.{command}"), "TOPICS", {})
        assert (command,) in known
        for topic in topics if isinstance(topics, dict) else ():
            module = import_module(f"anabranch.cli.{command}_{topic}")
            place = known[command, topic]
            offered = {name for name, _ in place.flags} | set(place.switches)
            names = {f"--{field.name.replace('_', '-')}" for field in fields(module.Flags)}
            assert {name.replace("--no-", "--") for name in offered} - {"--help"} == names, (command, topic)
            assert place.purpose == topics[topic]


def test_switches_are_offered_as_they_are_typed():
    """A flag that is on by default is turned off by --no-, and no value follows either kind."""
    for place in places():
        for name in place.switches:
            assert name not in dict(place.flags)
    assert "--resume" in next(place.switches for place in places() if place.words == ("measure",))


def test_another_shell_says_which_there_are(capsys):
    assert cli.main(["completion", "bsh"]) == 2
    assert "did you mean bash?" in capsys.readouterr().err
    assert cli.main(["completion"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
