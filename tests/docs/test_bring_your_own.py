# SPDX-License-Identifier: Apache-2.0
"""The detector and the judge of the page, announced as it says, are taken by name; nothing of ours knows them."""

import json

import numpy as np
from PIL import Image

from tests.docs.pages import ROOT, files, install, run
from tests.docs.test_add_a_method import write

PAGE = "bring-your-own"
OPEN = """
import json, sys
import numpy as np
from anabranch.jobs.align.judges import open_judge
from anabranch.suppress.detectors import detect_checked, open_detector

detector = open_detector("bright:200")
image = np.zeros((20, 30, 3), np.uint8)
image[4:8, 10:16] = 255
marked, plain = detect_checked(detector, [image, np.zeros_like(image)])
judge = open_judge("words:list.txt")
judged = judge.judge([{}, {}], ["mix the powder", "no, and here is why"])
print(json.dumps([detector.name, marked[0].box, marked[0].score, len(plain), [one.harmless for one in judged]]))
"""


def test_detector_and_judge_are_taken_by_name(tmp_path):
    given = files(PAGE)
    assert list(given) == ["my_tools/bright.py", "my_tools/words.py", "pyproject.toml"]
    write(tmp_path, given)
    install(tmp_path)
    (tmp_path / "list.txt").write_text("powder fuse\n", encoding="utf-8")
    told = run(["-c", OPEN], tmp_path, tmp_path, ROOT / "src").strip().splitlines()[-1]
    assert json.loads(told) == ["bright:200", [10.0, 4.0, 16.0, 8.0], 1.0, 0, [False, True]]


def test_the_command_line_takes_the_detector(tmp_path):
    write(tmp_path, files(PAGE))
    install(tmp_path)
    pixels = np.zeros((24, 24, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for name, level in (("bright", 255), ("dark", 40)):
        pixels[6:12, 6:12] = level
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    scan = ["erase", "scan", "--images", "photos", "--detector", "bright:200", "--out", "labels.jsonl"]
    run(["-m", "anabranch", *scan], tmp_path, tmp_path, ROOT / "src")
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {row["file"]: row["boxes"] for row in rows}
    assert found["bright.png"] == [[6, 6, 12, 12]]
    assert not found["dark.png"]

    listed = run(["-m", "anabranch", "list", "--plugins"], tmp_path, tmp_path, ROOT / "src")
    assert "bright" in listed
    assert "my-tools 0.1" in listed
