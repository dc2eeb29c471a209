# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

from anabranch import cli


def test_help_comes_without_torch_and_names_the_kinds():
    script = """
import sys
from anabranch.cli import main
try:
    main(["data", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "qr,watermark,text,patch" in done.stdout


def test_one_command_from_shipped_images_to_a_folder(tmp_path, capsys):
    out = tmp_path / "icd"
    arguments = ["data", "icd", "--images", "patchwork:garments", "--kind", "patch", "--ratio", "0.25", "--seed", "3"]
    settings = ["max_images=8", "glyph=plate-o", "opacity=[0.9, 0.95]", "caption=one {class}"]
    assert cli.main([*arguments, "--out", str(out), *(word for s in settings for word in ("--set", s))]) == 0
    assert "8 images, 2 of them (25.0%) with a mark of kind patch" in capsys.readouterr().out
    said = json.loads((out / "icd.json").read_text())
    assert (said["marked"], said["settings"]["opacity"], said["settings"]["seed"]) == (2, [0.9, 0.95], 3)
    rows = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    assert all(row["text"].startswith("one ") for row in rows)
    assert all(0.9 <= row["opacity"] <= 0.95 for row in rows if row["has_concept"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data"], "no images were named"),
        (["data", "icdd", "--images", "x"], "did you mean icd?"),
        (["data", "icd", "--image", "x"], "did you mean --images"),
        (["data", "icd", "--set", "glyf=ring"], "did you mean glyph"),
        (["data", "icd", "--set", "glyph=star"], "glyph cannot be used"),
        (["data", "icd", "--images", "patchwork:garments", "--kind", "text"], "at least 64 pixels"),
        (["data", "icd", "--images", "patchwork:garments", "--ratio", "2"], "0 to 1"),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
