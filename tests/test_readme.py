# SPDX-License-Identifier: Apache-2.0
"""The README: every command of it runs, in its order; every link leads somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from anabranch import cli
from anabranch.cli.flags import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True)[1:] for line in LINES if line.startswith("anabranch ")]
AFTER_THE_DEMO = "runs/demo"
SHORTER = {"--steps": "2", "--samples": "4"}


def told(argv):
    return " ".join(argv[:2])


@pytest.mark.parametrize("argv", COMMANDS, ids=told)
def test_every_command_is_one(argv):
    name, rest = argv[0], argv[1:]
    if hasattr(module := import_module(f"anabranch.cli.{name}"), "TOPICS") and not hasattr(module, "Flags"):
        assert rest[0] in module.TOPICS
        module, name, rest = import_module(f"anabranch.cli.{name}_{rest[0]}"), told(argv), rest[1:]
    parse(module.Flags, rest, name)


def test_what_needs_no_demo_runs_in_the_order_of_the_page(tmp_path, monkeypatch):
    """Shortened, in one process; the slow test runs it as written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    ran = []
    for argv in COMMANDS:
        if argv[0] not in ("measure", "pretrain", "customize") and argv[:2] not in (
            ["experts", "profile"], ["experts", "rank"], ["experts", "steer"], ["experts", "generate"],
            ["experts", "prune"], ["data", "icd"], ["erase", "scan"],
        ):  # fmt: skip
            continue
        shorter = [SHORTER.get(before, value) for before, value in zip(["", *argv], argv, strict=False)]
        more = ["--seeds", "1"] if argv[0] == "measure" else []
        assert cli.main([*shorter, *more]) == 0, argv
        ran.append(told(argv))
    assert len(ran) >= 9, ran


@pytest.mark.slow
def test_every_command_runs_as_it_stands(tmp_path):
    """The demo included: 17 minutes of processor time, and about ten more for the rest."""
    for argv in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "anabranch", *argv], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_every_link_and_every_target_is_there():
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", README, flags=re.MULTILINE)) <= targets


def test_every_snippet_of_python_names_what_exists():
    for language, block in BLOCKS:
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
