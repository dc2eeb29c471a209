# SPDX-License-Identifier: Apache-2.0
"""Tables that print, show and draw themselves: exact texts, nothing that acts, points where the numbers are."""

import subprocess
import sys

import pytest
from rich.console import Console

from anabranch.errors import UsageError
from anabranch.report.result import Estimate, Result, Results

HOSTILE = "<script>alert(1)</script>|\n`x`"


@pytest.fixture
def effects():
    rows = [
        ["right over wrong", Estimate(1.25, 0.5, 2.0), "shown"],
        ["experts over none", Estimate(-0.04, -0.75, 0.7), "not shown"],
        ["nobody looked", Estimate(None), ""],
    ]
    return Result("Differences", ["difference", "points", "verdict"], rows, ["Five seeds."])


def test_markdown_has_every_number_with_its_interval(effects):
    assert effects.table() == (
        "**Differences**\n\n"
        "| difference | points | verdict |\n"
        "| --- | --- | --- |\n"
        "| right over wrong | +1.2 [+0.5, +2.0] | shown |\n"
        "| experts over none | 0.0 [−0.8, +0.7] | not shown |\n"
        "| nobody looked | – |  |\n\n"
        "Five seeds."
    )


def test_a_level_has_no_sign_and_a_share_can_be_made_per_cent():
    rate = Estimate.of({"rate": 0.335, "low": 0.273, "high": 0.403}, signed=False, scale=100)
    assert str(rate) == "33.5 [27.3, 40.3]"
    assert str(Estimate.of({"difference": -0.25, "low": None, "high": None}, scale=100)) == "−25.0"
    assert str(Estimate.of(None)) == "–"


def test_a_hostile_label_ends_no_cell_and_runs_no_script():
    result = Result(HOSTILE, ["name", HOSTILE], [[HOSTILE, 1]], [HOSTILE])
    html = result._repr_html_()
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 4
    inert = r"\<script>alert(1)\</script>\| `x`"
    lines = [f"**{inert}**", "", f"| name | {inert} |", "| --- | --- |", f"| {inert} | 1 |", "", inert]
    assert result.table().splitlines() == lines


def test_rich_shows_labels_in_brackets_as_they_are(capsys):
    Console(width=100).print(Result("t", ["[red]name"], [["[bold]y"]]))
    said = capsys.readouterr().out
    assert "[red]name" in said
    assert "[bold]y" in said


def test_the_picture_has_a_point_and_an_interval_for_each_number(effects):
    (axes,) = effects.plot().axes
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert [1.25] in lines
    assert [0.5, 2.0] in lines
    assert [-0.04] in lines
    assert sum(len(line) == 1 for line in lines) == 2  # nobody looked: no point
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["right over wrong", "experts over none", "nobody looked"]


def test_a_matrix_writes_its_numbers_and_sets_the_clear_ones_bold():
    rows = [["a", Estimate(2.0, 1.0, 3.0), Estimate(-1.0, -2.0, 0.5)]]
    (axes,) = Result("m", ["from", "x", "y"], rows, layout="matrix").plot().axes
    assert [(text.get_text(), text.get_fontweight()) for text in axes.texts] == [("+2.0", "bold"), ("−1.0", "normal")]
    assert axes.images[0].get_array().tolist() == [[2.0, -1.0]]


def test_nothing_to_draw_and_no_such_table_say_so(effects):
    with pytest.raises(UsageError, match="cannot be drawn"):
        Result("words", ["a"], [["b"]]).plot()
    results = Results({"x": 1}, {"words": Result("words", ["a"], [["b"]]), "effects": effects})
    assert results["x"] == 1
    assert results.table() == "**words**\n\n| a |\n| --- |\n| b |"
    assert len(results.plot().axes) == 1  # the first that can be drawn
    with pytest.raises(UsageError, match="did you mean effects"):
        results.table("efects")


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected 2 cells"):
        Result("t", ["a", "b"], [["only one"]])


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    script = """
import sys
from anabranch.report.result import Estimate, Result
result = Result("t", ["a", "b"], [["x", Estimate(1.0, 0.0, 2.0)]])
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
result.plot().savefig(sys.argv[1])
assert matplotlib.rcParams.copy() == before and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.png")], check=True)
