# SPDX-License-Identifier: Apache-2.0
"""Losses over the global batch do not depend on how many processes share it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("two_processes.py")


def test_values_and_averaged_gradients_of_two_processes_are_those_of_one(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    spec = importlib.util.spec_from_file_location("two_processes", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    alone = worker.step(0, 1)
    for rank in range(2):
        shared = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shared.keys() == alone.keys()
        for name, values in alone.items():
            assert shared[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert all(any(abs(number) > 1e-4 for number in values[1:]) for values in alone.values())
