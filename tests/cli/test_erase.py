# SPDX-License-Identifier: Apache-2.0
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import segno
from PIL import Image

from anabranch import cli
from anabranch.cli.erase import TOPICS


@pytest.fixture
def folder(tmp_path):
    """Four grey images, a QR code in one of them."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("L", (200, 160), 60 * i).save(images / f"{i}.png")
    modules = [[0 if dark else 255 for dark in row] for row in segno.make("https://mark.test/1").matrix_iter(border=3)]
    code = np.kron(np.array(modules, np.uint8), np.ones((3, 3), np.uint8))
    with Image.open(images / "1.png") as picture:
        picture.paste(Image.fromarray(code), (20, 30))
        picture.save(images / "1.png")
    return images


def test_topics_are_listed_and_help_needs_no_torch(capsys):
    assert cli.main(["erase"]) == 0
    said = capsys.readouterr().out
    assert all(topic in said for topic in TOPICS)
    script = """
import sys
from anabranch.cli import main
for arguments in (["erase"], ["erase", "--help"], ["erase", "scan", "--help"], ["erase", "scan", "--imges", "x"]):
    try:
        main(arguments)
    except SystemExit:
        pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scn"], "did you mean scan?"),
        (["scan", "--imges", "x"], "did you mean --images?"),
        (["scan"], "--images is missing"),
        (["scan", "--images", "x", "--detector", "qrcode", "--set", "geometri=none"], "did you mean geometry?"),
        (["scan", "--images", ".", "--set", "geometry=cam"], "geometry cannot be used"),
    ],
)
def test_wrong_usage(arguments, says, capsys):
    assert cli.main(["erase", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_is_scanned(folder, tmp_path, capsys):
    out = tmp_path / "labels.jsonl"
    arguments = [
        "erase",
        "scan",
        "--images",
        str(folder),
        "--detector",
        "qr",
        "--out",
        str(out),
        "--concept",
        "QR code",
    ]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["has_concept"] for row in rows] == [False, True, False, False]
    x1, y1, x2, y2 = rows[1]["boxes"][0]
    assert (x1, y1, x2, y2) == pytest.approx((20, 30, 20 + 93, 30 + 93), abs=12)
    assert {"file", "width", "height", "sha256", "score", "scores", "second_score"} <= rows[0].keys()
    header = json.loads(out.with_suffix(".json").read_text())
    assert header["detector"]["name"] == "qr"
    assert header["images"] == str(folder)
    said = capsys.readouterr().out
    assert "contain it     25.0 %" in said
    assert "false alarms   not measured: give --clean" in said


def test_a_scan_that_is_stopped_leaves_nothing(folder, tmp_path):
    for i in range(4, 200):
        Image.new("L", (700, 700), i).save(folder / f"{i}.png")
    out = tmp_path / "labels.jsonl"
    arguments = ["erase", "scan", "--images", str(folder), "--detector", "qr", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "anabranch", *arguments], stderr=subprocess.PIPE, text=True)
    process.stderr.readline()  # the first line of progress
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.wait(timeout=30)
    process.stderr.close()
    assert process.returncode != 0
    assert time.monotonic() - started < 10
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
