# SPDX-License-Identifier: Apache-2.0
"""The notebooks run, and find what their text says that they find."""

import re
import sys

import pytest

from tests.docs.pages import DOCS

FOLDER = DOCS / "notebooks"
sys.path.insert(0, str(FOLDER))

import execute  # noqa: E402

NAMES = ("transfer", "erase", "align", "experts")


def printed(name, tmp_path):
    notebook = execute.executed(FOLDER / f"{name}.ipynb", tmp_path)
    return "".join(map(execute.printed, notebook.cells))


def numbers(text, line):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", re.search(line, text)[0])]


def test_experts(tmp_path):
    text = printed("experts", tmp_path)
    own, maths, python = numbers(text, r"ftri .*\d\.\d.*")
    assert own > max(maths, python) + 0.3  # what sets texts against each other finds what is particular
    drawn = numbers(text, r"random, mean of 3.*")
    assert numbers(text, r"easy_ep.*")[0] < drawn[0] / 2
    assert "experts a layer: 4" in text


@pytest.mark.slow
def test_transfer(tmp_path):
    text = printed("transfer", tmp_path)
    assert len(re.findall(r"^(garments|digits): (hurt by|helped by|cannot tell)", text, re.MULTILINE)) == 2
    assert text.count("7,680 parameters") == 2
    assert len(re.findall(r"the model for \w+ +\d+\.\d % of the digits right", text)) == 2


@pytest.mark.slow
def test_erase(tmp_path):
    text = printed("erase", tmp_path)
    difference, low, high = numbers(text, r"negative prompt: detected.*\n +minus before.*points \[.*\]")[-3:]
    assert low < difference < high < 0  # places and a detector: shown, as the text says


@pytest.mark.slow
def test_align(tmp_path):
    text = printed("align", tmp_path)
    exact = {name: numbers(text, rf"{name} +exactly right.*")[0] for name in ("base", "mote", "random")}
    assert exact["base"] < 10
    assert exact["mote"] > exact["random"] + 20


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_small_and_names_no_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 30_000
    assert "image/png" not in text
    assert not re.search(r"/(tmp|home|root|work)/", text)
    assert '"output_type": "stream"' in text  # it was run before it was kept
    assert '"stderr"' not in text
