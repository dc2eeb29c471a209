# SPDX-License-Identifier: Apache-2.0
"""Nothing that opens a file runs what is in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.errors import AnabranchError
from tests.trust.loaders import sign
from tests.trust.payloads import marks, zoo

ROOT = Path(__file__).parent.parent.parent

SAMPLE = 9
"""Of the fast tests: every loader gets each ninth payload, starting at another one each."""


def attack(loader, zoo_of, folder):
    """Every payload in the place of every file, and in pickled files that would be opened were the first missing."""
    attempts, ran, raw = 0, [], {}
    for file in (*loader.files, *loader.elsewhere):
        for name, data, _ in zoo_of:
            shutil.rmtree(folder / "copy", ignore_errors=True)
            shutil.copytree(loader.folder, folder / "copy")
            if file in loader.elsewhere:
                (folder / "copy" / loader.files[0]).unlink()
            (folder / "copy" / file).write_bytes(data)
            if not file.endswith(".json"):
                sign(folder / "copy")
            attempts += 1
            try:
                loader.open(folder / "copy")
            except AnabranchError:
                pass
            except Exception as error:
                raw[f"{loader.name}/{file}: {type(error).__name__}"] = str(error)[:200]
            if marks(folder):
                ran.append(f"{name} in {loader.name}/{file}")
    return attempts, ran, raw


@pytest.mark.row("S1", sample=True)
def test_each_payload_runs_where_somebody_unpickles_it(tmp_path, counted):
    """In a process of its own: some leave pipes open or children behind."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.trust.payloads", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    fell, total = json.loads(done.stdout.splitlines()[-1])
    assert total >= 30
    counted(0, control=(fell, f"of {total} payloads run where somebody unpickles them"), least=total)


@pytest.mark.row("S1", sample=True)
def test_a_few_payloads_run_in_no_loader(loaders, tmp_path, counted):
    attempts, ran, raw = 0, [], {}
    payloads = zoo(tmp_path / "mark")
    for number, loader in enumerate(loaders.values()):
        few = [payloads[(number + i) % len(payloads)] for i in range(0, len(payloads), 30 if loader.slow else SAMPLE)]
        more, did, unexpected = attack(loader, few, tmp_path)
        attempts, ran, raw = attempts + more, ran + did, raw | unexpected
    assert ran == []
    assert raw == {}
    counted(attempts, len(ran))


@pytest.mark.slow
@pytest.mark.row("S1", cheap=True)
def test_no_payload_runs_in_any_loader(loaders, tmp_path, counted):
    attempts, ran = 0, []
    for loader in loaders.values():
        more, did, raw = attack(loader, zoo(tmp_path / "mark"), tmp_path)
        attempts, ran = attempts + more, ran + did
        assert raw == {}
    assert ran == []
    counted(attempts, len(ran))
