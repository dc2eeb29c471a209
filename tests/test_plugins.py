# SPDX-License-Identifier: Apache-2.0
"""Methods, detectors and judges of another package, used by their names through the commands."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from anabranch import cli, registry
from anabranch.errors import AnabranchError, UsageError
from anabranch.jobs.align.judges import open_judge
from anabranch.suppress.detectors.open import open_detector
from tests.jobs.align.test_commands import model_folder

METHOD = '''"""Turn experts over, on the left.

Paper     : none.
Equation  : y = -x
Shapes    : any.
Differs   : nothing.
Check     : theirs.
"""
import torch
'''
DETECTOR = """
from anabranch.suppress.detectors.protocol import Detection

class Bright:
    name, version = "bright", "1"
    def __init__(self, rest, *, concept, threshold):
        self.least, self.threshold = int(rest), 0.5 if threshold is None else threshold
    def detect(self, images, files=None):
        return [[Detection(float(image.mean() > self.least), None)] for image in images]

class NoThreshold:
    name, version = "bare", "1"
    def __init__(self, rest, **options): ...

def fails(rest, **options):
    raise RuntimeError("no such camera")
"""
JUDGE = """
from anabranch.jobs.align.judges import Judged

class Polite:
    name = "polite"
    def __init__(self, rest, *, threshold, batch_size): ...
    def judge(self, questions, answers):
        return [Judged(harmless=True, helpful="w" in answer, refused=False) for answer in answers]
"""
ENTRIES = """\
[anabranch.methods]
overturn = other_parts.deep.overturn
not_a_module = other_parts.detector:Bright
{more}
[anabranch.detectors]
bright = other_parts.detector:Bright
bare = other_parts.detector:NoThreshold
camera = other_parts.detector:fails
lost = other_parts.nowhere:Lost
broken = other_parts.broken:Thing

[anabranch.judges]
polite = other_parts.judge:Polite
"""


def package(site, name, entries):
    info = site / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entries)
    return site


@pytest.fixture
def site(tmp_path, monkeypatch):
    root = package(tmp_path / "site", "other-parts", ENTRIES.format(more=""))
    (root / "other_parts" / "deep").mkdir(parents=True)
    (root / "other_parts" / "__init__.py").write_text("import torch\n")
    (root / "other_parts" / "deep" / "__init__.py").write_text("raise RuntimeError('listing runs nothing')\n")
    for file, text in (("deep/overturn", METHOD), ("detector", DETECTOR), ("judge", JUDGE), ("broken", "1 / 0\n")):
        (root / "other_parts" / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(str(root))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "other_parts"]:
        del sys.modules[name]


def test_they_are_listed_with_their_package_and_nothing_of_them_is_run(site):
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\nfrom anabranch import cli\n"
        "cli.main(['list']); cli.main(['list', '--method', 'overturn']); cli.main(['list', '--plugins'])\n"
        "assert not {'torch', 'other_parts'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Turn experts over, on the left. [other-parts]" in done.stdout
    assert "y = -x" in done.stdout
    for line in ("bright", "polite", "overturn"):
        (row,) = [row for row in done.stdout.splitlines() if row.startswith(f"  {line} ")]
        assert "other-parts 1.2" in row


def test_a_scan_uses_a_detector_by_its_name(site, tmp_path, capsys):
    for name, level in (("dark", 10), ("light", 240)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    scan = ["erase", "scan", "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "labels.jsonl")]
    assert cli.main([*scan, "--concept", "light", "--detector", "bright:128"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    found = {row["file"]: row["has_concept"] for row in rows if "has_concept" in row}
    assert found == {"dark.png": False, "light.png": True}
    capsys.readouterr()
    assert cli.main([*scan[:-1], str(tmp_path / "others.jsonl"), "--detector", "brigt:128"]) == 2
    said = capsys.readouterr().err
    assert "did you mean bright?" in said
    assert "installed: bare, bright, broken, camera, lost" in said


def test_an_evaluation_uses_a_judge_by_its_name(site, tmp_path, capsys):
    model_folder(tmp_path / "model")
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "question": "w1 w2", "kind": "benign"}\n')
    asked = ["align", "eval", "--model", tmp_path / "model", "--questions", tmp_path / "questions.jsonl"]
    command = [str(word) for word in [*asked, "--judge", "polite", "--out", tmp_path / "eval"]]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["judge"]["name"] == "polite"
    with pytest.raises(UsageError, match=r"there is no judge 'polit'(.|\n)*installed: polite(.|\n)*mean polite"):
        open_judge("polit")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lost", "ModuleNotFoundError: No module named 'other_parts.nowhere'"),
        ("broken", "ZeroDivisionError"),
        ("bare", "a NoThreshold without threshold, detect"),
        ("camera", "RuntimeError: no such camera"),
        ("bright:dim", "ValueError: invalid literal"),
    ],
)
def test_a_broken_one_is_an_error_that_names_its_package(site, name, says):
    with pytest.raises(AnabranchError, match="from the package other-parts 1.2, does not work") as caught:  # noqa: RUF043
        open_detector(name)
    assert says in str(caught.value)
    assert not isinstance(caught.value, UsageError), "the person who types the name did nothing wrong"


def test_a_method_has_to_be_a_module_that_can_be_imported(site):
    with pytest.raises(AnabranchError, match=r"'not_a_module', from the package other-parts(.|\n)*a type"):
        registry.get("not_a_module")
    with pytest.raises(AnabranchError, match=r"'overturn', from the package other-parts(.|\n)*listing runs nothing"):
        registry.get("overturn")


def test_a_name_that_two_packages_use_is_refused_and_ours_stay_ours(site, monkeypatch):
    package(site.parent / "second", "more-parts", "[anabranch.detectors]\nbright = more:Bright\nqr = more:Qr\n")
    monkeypatch.syspath_prepend(str(site.parent / "second"))
    with pytest.raises(UsageError, match=r"several detectors(.|\n)*more-parts 1.2, other-parts 1.2"):
        open_detector("bright:128")
    assert type(open_detector("qr")).__module__ == "anabranch.suppress.detectors.qr"
