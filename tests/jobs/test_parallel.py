# SPDX-License-Identifier: Apache-2.0
"""Work side by side ends with the process that asked for it."""

import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import os, sys, threading
from pathlib import Path
from anabranch.jobs.parallel import side_by_side

def for_ever(folder, item):
    (Path(folder) / str(item)).write_text(str(os.getpid()))
    threading.Event().wait()

if __name__ == "__main__":
    list(side_by_side(for_ever, sys.argv[1], [0, 1], 2))
"""


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


def runs(pid):
    """Nobody may be there to bury it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_parent_leaves_no_process_at_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    pids = [tmp_path / "0", tmp_path / "1"]
    try:
        until(lambda: all(file.exists() and file.read_text() for file in pids), 120)
        workers = [int(file.read_text()) for file in pids]
        assert all(runs(pid) for pid in workers)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(runs(pid) for pid in workers), 30)
