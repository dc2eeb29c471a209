# SPDX-License-Identifier: Apache-2.0
"""Tests in orders that were drawn: one that needs another to have run before it would fail in some of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("mixture", "measure", "allocate", "report")
"""The cheap ones: the other tests start processes or train for seconds each."""
PLANTED = """
seen = []
def test_first():
    seen.append(1)
def test_second():
    assert seen
"""


def in_drawn_order(seed, folder, *places):
    """(how many passed, how many did not)."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "tests.shuffle", "--shuffle", str(seed)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *places], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return found.get("passed", 0), found.get("failed", 0) + found.get("error", 0), done.stdout[-2000:]


@pytest.mark.night
@pytest.mark.row("U8")
def test_the_order_of_the_tests_changes_nothing(tmp_path, counted):
    tried, failed, told = 0, 0, []
    for seed in range(5):
        passed, broken, out = in_drawn_order(seed, ROOT, *(f"tests/{name}" for name in FOLDERS))
        tried, failed = tried + passed + broken, failed + broken
        told += [out] if broken else []
    (tmp_path / "test_planted.py").write_text(PLANTED)
    found = sum(in_drawn_order(seed, tmp_path, "test_planted.py")[1] for seed in range(5))
    assert told == []
    counted(tried, failed, control=(found, "of 5 orders show that a planted test needs another"))
