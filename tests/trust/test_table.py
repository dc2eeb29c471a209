# SPDX-License-Identifier: Apache-2.0
"""The table itself: harm, a failed test and a control that saw nothing each end `make trust` with exit code 3."""

from xml.etree import ElementTree

import pytest

from tests.many import TESTS, load

BEGIN, END = "<!-- trust:begin -->", "<!-- trust:end -->"


@pytest.fixture
def trust(tmp_path, monkeypatch):
    module = load(TESTS.parent / "scripts" / "trust.py")
    for name in ("FRONT", "PAGE"):
        page = tmp_path / f"{name}.md"
        page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
        monkeypatch.setattr(module, name, page)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def results(*cases):
    """(row, properties, what became of it) a case, as pytest writes them down."""
    suite = ElementTree.Element("testsuite")
    for number, (row, said, ending) in enumerate(cases):
        case = ElementTree.SubElement(suite, "testcase", classname="tests", name=f"test_{number}")
        properties = ElementTree.SubElement(case, "properties")
        for name, value in [("row", row), ("sample", "False"), ("tier", "fast"), *said]:
            ElementTree.SubElement(properties, "property", name=name, value=value)
        if ending:
            ElementTree.SubElement(case, ending, message=ending)
    return ElementTree.tostring(suite)


def run(trust, monkeypatch, cases, *arguments, code=0):
    def write(tier, file, only):
        file.write_bytes(results(*cases))
        return code

    monkeypatch.setattr(trust, "run_tests", write)
    return trust.main(list(arguments)), trust.PAGE.read_text()


GOOD = ("R4", [("faults", "5"), ("bad", "0"), ("control", "2 differ"), ("control_seen", "2")], "")


def test_a_clean_run_is_written_down_and_told_apart_by_row(trust, monkeypatch, capsys):
    other = ("R9", [("faults", "7"), ("bad", "0")], "")
    code, page = run(trust, monkeypatch, [GOOD, GOOD, other])
    assert code == 0
    assert page.startswith("above\n")
    assert page.endswith("below\n")
    assert "old" not in page
    assert "| 10 | 0 | 2 differ | fast |" in page
    assert "| 7 | 0 | *none* | fast |" in page
    assert f"17 faults in 2 of {len(trust.ROWS)} rows" in page
    assert "| R1 |" in capsys.readouterr().out
    front = trust.FRONT.read_text()
    assert "| 17 | 0 | 1 of 2 |" in front  # R9 has no control
    assert "\nold\n" not in front


@pytest.mark.parametrize(
    "case",
    [
        ("R4", [("faults", "5"), ("bad", "1")], "failure"),
        ("R4", [], "failure"),
        ("R4", [], "error"),
        ("R4", [("faults", "5"), ("bad", "0"), ("control", "0 differ"), ("control_seen", "0")], ""),
    ],
    ids=["harm", "failed", "broken", "blind"],
)
def test_harm_failures_and_blind_controls_end_with_3(trust, monkeypatch, case):
    assert run(trust, monkeypatch, [GOOD, case], code=1 if case[2] else 0)[0] == 3


def test_some_rows_are_printed_and_written_nowhere(trust, monkeypatch, capsys):
    other = ("R9", [("faults", "7"), ("bad", "0")], "")
    code, page = run(trust, monkeypatch, [GOOD, other], "full", "--rows", "R4")
    assert code == 0
    assert "old" in page
    said = capsys.readouterr().out
    assert "| R4 |" in said
    assert "| R9 |" not in said
    with pytest.raises(SystemExit) as stop:
        trust.main(["--rows", "R99"])
    assert stop.value.code == 2
