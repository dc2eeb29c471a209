# SPDX-License-Identifier: Apache-2.0
"""What the comparison of sub-nets says in words: which tasks lose, and which models have collapsed."""

from anabranch.jobs.transfer.sdr_compare import collapse_rows, harmed


def fair(**means):
    tasks = {task: {"mean": mean, "low": mean - 1, "high": mean + 1, "count": 3} for task, mean in means.items()}
    return {"effects": [{"left": "sdr", "right": "continued", "tasks": tasks}]}


def test_only_a_task_that_loses_more_than_half_a_point_is_named():
    assert harmed(fair(digits=-0.4, garments=3.0)).startswith("No task loses")
    said = harmed(fair(digits=-0.6, garments=3.0))
    assert "digits" in said
    assert "garments" not in said


def test_a_model_counts_as_collapsed_against_the_base_of_its_own_seed():
    ranks = {"base": {0: [20], 1: [10]}, "sdr": {0: [9, 10], 1: [9, 4]}}
    rows = collapse_rows({"ranks": ranks, "spread": {"sdr": 0.97}})
    assert rows[1] == ["sdr", "0.97", "8.0", "4", "2 of 4"]
