# SPDX-License-Identifier: Apache-2.0
"""Nothing that was acknowledged is ever lost: at every file-system call, at random kills, on full disks."""

import shutil
import subprocess

import pytest

IN_A_MOUNT_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def assert_nothing_lost(found, at_least, counted):
    points = {name: result["points"] for name, result in found.items()}
    lost = [loss for result in found.values() for loss in result["lost"]]
    counted(sum(points.values()), len(lost))
    assert lost == []
    assert sum(points.values()) >= at_least, points


@pytest.fixture(scope="module")
def some_of_each(worker_result, tmp_path_factory):
    return worker_result("crash_worker.py", "some-of-each", tmp_path_factory.mktemp("faults"))


@pytest.mark.row("R1", sample=True)
def test_dying_at_every_seventh_file_system_call_loses_nothing(some_of_each, counted):
    assert_nothing_lost(some_of_each["enumerate"], 75, counted)


@pytest.mark.row("R1", cheap=True)
@pytest.mark.slow
def test_dying_at_every_file_system_call_loses_nothing(worker_result, tmp_path, counted):
    assert_nothing_lost(worker_result("crash_worker.py", "enumerate", tmp_path, 1), 500, counted)


@pytest.mark.row("R1", sample=True)
def test_dying_while_saving_in_place_loses_what_was_acknowledged(some_of_each, counted):
    found = some_of_each["enumerate-in-place"]
    assert found["points"] >= 5
    counted(0, control=(len(found["lost"]), f"of {found['points']} lose a checkpoint that is saved in place"))


@pytest.mark.row("R2", sample=True)
def test_20_kills_lose_nothing(some_of_each, counted):
    found = some_of_each["kill"]
    counted(20, len(found["lost"]))
    assert found["saves"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(200, marks=pytest.mark.row("R2", sample=True, cheap=True)),
        pytest.param(2000, marks=[pytest.mark.row("R2"), pytest.mark.night]),
    ],
)
def test_kills_lose_nothing_while_saving_in_place_does(worker_result, tmp_path, kills, counted):
    for name in ("ours", "in-place"):
        (tmp_path / name).mkdir()
    found = worker_result("crash_worker.py", "kill", tmp_path / "ours", kills)
    assert found["lost"] == []
    assert found["saves"] >= kills / 2  # else the kills hit nothing
    control = worker_result("crash_worker.py", "kill-in-place", tmp_path / "in-place", 200)
    counted(kills, len(found["lost"]), control=(len(control["lost"]), "of 200 lost when saving in place (R3)"))


@pytest.mark.row("R7")
def test_a_write_that_the_system_cuts_off_keeps_the_last_good_checkpoint(some_of_each, counted):
    found = some_of_each["file-size"]
    control = some_of_each["file-size-in-place"]
    words = f"of {control['limits']} leave nothing to load when saving in place"
    counted(found["faults"], len(found["wrong"]), control=(len(control["lost"]), words))
    assert found["faults"] >= 20
    assert all("could not write DISK/run/checkpoints/step-000002" in message for message in found["messages"])
    assert all("expected: 465544 bytes" in message and "bytes free" in message for message in found["messages"])


@pytest.mark.row("R7", cheap=True)
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(worker_result, tmp_path, counted):
    if shutil.which("unshare") is None or subprocess.run([*IN_A_MOUNT_NAMESPACE, "true"], check=False).returncode:
        pytest.skip("needs a mount namespace of its own, to make a small disk in")
    launcher = [*IN_A_MOUNT_NAMESPACE, f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$0" "$@"']
    found = worker_result("crash_worker.py", "full-disk", tmp_path, 60, launcher=launcher)
    counted(found["faults"], len(found["wrong"]))
    assert found["faults"] >= 40
    assert all("No space left on device" in message for message in found["messages"])


@pytest.mark.row("R9")
def test_a_read_only_place_is_refused_in_words(some_of_each):
    found = some_of_each["read-only"]
    assert found["exit_code"] == 2
    assert "cannot write a run to" in found["message"]
    assert "Permission denied" in found["message"]
    assert "try: another --out" in found["message"]
