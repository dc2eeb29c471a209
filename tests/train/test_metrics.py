# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from anabranch.errors import AnabranchError
from anabranch.train.metrics import MeanWindow, MetricsWriter, read_metrics


def write_lines(path, steps, **options):
    with MetricsWriter(path, **options) as metrics:
        for step in steps:
            metrics.write(step, loss=step / 3)


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


def test_lines_can_be_read_while_the_file_is_still_open(tmp_path):
    metrics = MetricsWriter(tmp_path / "m.jsonl")
    metrics.write(1, loss=0.1 + 0.2)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.1 + 0.2}]
    metrics.close()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_is_passed_over_and_overwritten(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    write_lines(path, [1, 2, 3])
    content = path.read_bytes()
    path.write_bytes(content[: -min(cut, len(content.splitlines(keepends=True)[-1]) - 1)])
    assert steps_of(path) == [1, 2]
    write_lines(path, [3, 4], after_step=2)
    assert steps_of(path) == [1, 2, 3, 4]


def test_a_resumed_run_tells_each_step_once(tmp_path):
    write_lines(tmp_path / "m.jsonl", [10, 20, 30, 40])
    write_lines(tmp_path / "m.jsonl", [30, 40, 50], after_step=25)
    assert steps_of(tmp_path / "m.jsonl") == [10, 20, 30, 40, 50]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(AnabranchError, match="line 2: expected a JSON object with a step"):
        read_metrics(tmp_path / "m.jsonl")


def test_values_that_json_has_no_words_for_become_null(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        metrics.write(1, a=float("nan"), b=float("-inf"), c=2.0)
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 2.0}


def test_the_window_means_what_was_added_also_after_a_resume():
    window = MeanWindow()
    for count in (1.0, 2.0, 6.0):
        window.add({"count": count, "rare": 4.0} if count == 2 else {"count": count})
    resumed = MeanWindow(json.loads(json.dumps(window.to_json())))
    assert window.close() == resumed.close() == {"count": 3.0, "rare": 4.0}
    assert window.to_json() == {}
