# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.many import ONE_THREAD, TESTS, load

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny():
    """The module tiny.py, which the worker scripts import as well."""
    return load(HERE / "tiny.py")


@pytest.fixture(scope="module")
def start_worker():
    """Start a worker script in a process of its own, without the threads of the test process: a fork breaks those."""
    started = []

    def start(script, *arguments, launcher=()):
        command = [*launcher, sys.executable, str(HERE / script), *map(str, arguments)]
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(TESTS.parent)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def worker_result(start_worker):
    """Run a worker script to its end; the last line that it prints is its result as JSON."""

    def run(script, *arguments, launcher=()):
        process = start_worker(script, *arguments, launcher=launcher)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    return run
