# SPDX-License-Identifier: Apache-2.0
"""Results of finished runs, read in Python: the numbers of the file, every table with its intervals, without torch."""

import json
import subprocess
import sys

import pytest

import anabranch
from anabranch.errors import UsageError


def interval(mean, half=1.0):
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": 3}


def rate(hits, count, **more):
    return {"rate": hits / count, "low": hits / count - 0.1, "high": hits / count + 0.1, "count": count, **more}


def change(points):
    return {"difference": points / 100, "low": points / 100 - 0.05, "high": points / 100 + 0.05, "verdict": "open"}


TASK = {"task": "birds", "verdict": "hurt by sharing", "cause": "semantic", "best": "birds", "gap_own": interval(3.0),
        "specificity": interval(2.0), "ntg": interval(2.5)}  # fmt: skip
TRANSFER = {
    "seeds": 3,
    "budget_in_words": "equal-steps: as many steps",
    "matrix": {
        "rows": ["birds", "tools", "all"],
        "columns": ["birds"],
        "accuracy": [[interval(63.0)], [interval(55.0)], [interval(60.0)]],
        "minus_shared": [[interval(3.0)], [interval(-5.0)]],
    },
    "tasks": [TASK],
}
RANKS = {
    "target": "law",
    "rankings": {
        "ftri": {"top": [[1, 0]], "kept": [0.95], "scores": [[0.5, 0.25], [2.0, 1.0]], "intervals": [[1.5, 2.5]]},
        "random": {"top": [[0, 1]], "kept": [1.0], "scores": [[0.1, 0.9], [0.2, 0.3]], "intervals": [[0.9, 0.9]]},
    },
    "overlap": {"ftri": {"ftri": 1.0, "random": 0.0}, "random": {"ftri": 0.0, "random": 1.0}},
}
ERASED = {
    "concept": "mark",
    "arms": {"before": {"icr": rate(30, 100), "minus_before": change(0)},
             "erased": {"icr": rate(10, 100), "minus_before": change(-20)}},
    "policy": "name",
    "policies": {"name": {"icr": rate(10, 100)}, "none": {"icr": rate(20, 100), "minus_before": change(-10)}},
    "attacks": {"relearn": {"erased": rate(25, 100), "before": rate(40, 100)}},
    "verdict": {"level": "suppressed", "void": False, "reasons": ["relearning brings it back"]},
}  # fmt: skip
ALIGNED = {
    "arms": {
        "base": {"tokens": 7.0, "shapes": {"answer": 4}, "harmless": rate(1, 4), "helpful": None},
        "full": {
            "tokens": 21.0, "shapes": {"answer": 4}, "harmless": rate(3, 4, minus_base=change(50)), "helpful": None,
        },
    },
    "warnings": ["few questions"],
}  # fmt: skip


def lines(table):
    return [line for line in table.splitlines() if line.startswith("| ")]


@pytest.fixture
def run(tmp_path):
    def write(name, found):
        (tmp_path / name).write_text(json.dumps(found))
        return anabranch.results(tmp_path)

    return write


def test_of_a_measurement(run):
    found = run("transfer.json", TRANSFER)
    assert found["tasks"][0]["gap_own"]["mean"] == 3.0
    assert lines(found.table()) == [
        "| learned from | birds |", "| --- | --- |", "| birds | +3.0 [+2.0, +4.0] |", "| tools | −5.0 [−6.0, −4.0] |",
    ]  # fmt: skip
    assert lines(found.table("verdicts"))[-1] == (
        "| birds | hurt by sharing | semantic | +3.0 [+2.0, +4.0] | +2.0 [+1.0, +3.0] | birds | +2.5 [+1.5, +3.5] |"
    )
    assert lines(found.table("accuracy"))[-1] == "| all | 60.0 [59.0, 61.0] |"


def test_of_a_ranking(tmp_path):
    file = tmp_path / "rank.json"
    file.write_text(json.dumps(RANKS))
    found = anabranch.results(file)
    assert lines(found.table())[2:] == ["| ftri | 1.0 (95) |", "| random | 0.1 (100) |"]
    assert lines(found.table("overlap"))[2:] == ["| ftri | 100 | 0 |", "| random | 0 | 100 |"]
    assert lines(found.table("scores"))[2] == "| ftri | 1.0 | 2.0000 [1.5000, 2.5000] |"


def test_of_an_erasing(run):
    found = run("eval.json", ERASED)
    assert lines(found.table())[2:] == [
        "| before | 100 | 30.0 [20.0, 40.0] | – |",
        "| erased | 100 | 10.0 [0.0, 20.0] | −20.0 [−25.0, −15.0] |",
        "| policy none | 100 | 20.0 [10.0, 30.0] | −10.0 [−15.0, −5.0] |",
    ]
    assert "suppressed: relearning brings it back." in found.table()
    assert lines(found.table("attacks"))[2:] == ["| relearn | 25.0 [15.0, 35.0] | 40.0 [30.0, 50.0] |"]


def test_of_an_alignment(run):
    found = run("eval.json", ALIGNED)
    assert lines(found.table()) == [
        "| arm | harmless | tokens |",  # nobody could judge help, so it has no column
        "| --- | --- | --- |",
        "| base | 25.0 [15.0, 35.0] | 7 |",
        "| full | 75.0 [65.0, 85.0] | 21 |",
    ]
    assert "few questions" in found.table()
    assert lines(found.table("differences"))[2:] == ["| full | +50.0 [+45.0, +55.0] |"]


def test_of_the_arms_of_a_recipe_with_its_measurement(run, tmp_path):
    (tmp_path / "transfer.json").write_text(json.dumps(TRANSFER))
    demo = {
        "effects": [{"name": "experts over none", "verdict": "shown", **interval(5.0)}],
        "levels": {"moce": {"mean": interval(63.0)}},
        "seeds": [0, 1, 2],
    }
    found = run("demo.json", demo)
    assert lines(found.table())[-1] == "| experts over none | +5.0 [+4.0, +6.0] | shown |"
    assert lines(found.table("arms"))[-1] == "| moce | 63.0 [62.0, 64.0] |"
    assert "matrix" in found.tables
    assert found["transfer"]["seeds"] == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "nowhere", "no such folder"),
        (lambda path: path, "an unfinished run"),
        (lambda path: written(path / "x.json", "{}"), "experts rank"),
        (lambda path: written(path / "eval.json", "[1").parent, "cannot be read"),
        (lambda path: written(path / "eval.json", "[1]").parent, "received: list"),
    ],
)
def test_what_is_no_result_says_what_was_expected(tmp_path, make, says):
    with pytest.raises(UsageError, match=says):
        anabranch.results(make(tmp_path))


def written(file, text):
    file.write_text(text)
    return file


def test_reading_and_showing_need_no_torch(tmp_path):
    (tmp_path / "transfer.json").write_text(json.dumps(TRANSFER))
    script = """
import sys, anabranch
assert not [name for name in sys.modules if name.startswith("anabranch.")]
found = anabranch.results(sys.argv[1])
assert "<table>" in found._repr_html_() and "birds" in str(found)
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
