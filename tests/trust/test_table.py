# SPDX-License-Identifier: Apache-2.0
"""The table: harm, a failed test, and a control that is missing or saw too little each end `make trust` with 3."""

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
BARE = ("R9", [("faults", "7"), ("bad", "0")], "")


def test_a_clean_run_is_written_down_and_told_apart_by_row(trust, monkeypatch, capsys):
    control = ("R9", [("faults", "0"), ("control", "3 of 3"), ("control_seen", "3"), ("control_least", "3")], "")
    code, page = run(trust, monkeypatch, [GOOD, GOOD, BARE, control])
    assert code == 0
    assert page.startswith("above\n")
    assert page.endswith("below\n")
    assert "old" not in page
    assert "| 10 | 0 | 2 differ | fast |" in page
    assert "| 7 | 0 | 3 of 3 | fast |" in page
    assert "| | what | faults and checks | harm |" in page
    assert f"17 faults and checks in 2 of {len(trust.ROWS)} rows" in page
    assert "| R1 |" in capsys.readouterr().out
    front = trust.FRONT.read_text()
    assert "| 17 | 0 | 2 of 2 |" in front
    assert "\nold\n" not in front


@pytest.mark.parametrize(
    "case",
    [
        ("R4", [("faults", "5"), ("bad", "1")], "failure"),
        ("R4", [], "failure"),
        ("R4", [], "error"),
        ("R4", [("faults", "5"), ("bad", "0"), ("control", "0 differ"), ("control_seen", "0")], ""),
        ("R4", [("faults", "5"), ("control", "2 of 3"), ("control_seen", "2"), ("control_least", "3")], ""),
        BARE,
    ],
    ids=["harm", "failed", "broken", "blind", "half blind", "without a control"],
)
def test_harm_failures_and_blind_controls_end_with_3(trust, monkeypatch, case):
    assert run(trust, monkeypatch, [GOOD, case], code=1 if case[2] else 0)[0] == 3


def test_a_row_whose_control_could_not_run_is_told_so_and_breaks_nothing(trust, monkeypatch):
    code, page = run(trust, monkeypatch, [GOOD, BARE, ("R9", [], "skipped")])
    assert code == 0
    assert "| 7 | 0 | 1 not run: skipped | fast |" in page
    assert "| 12 | 0 | 1 of 2 |" in trust.FRONT.read_text()


def test_some_rows_are_printed_and_written_nowhere(trust, monkeypatch, capsys):
    code, page = run(trust, monkeypatch, [GOOD, BARE], "full", "--rows", "R4")
    assert code == 0
    assert "old" in page
    said = capsys.readouterr().out
    assert "| R4 |" in said
    assert "| R9 |" not in said
    assert run(trust, monkeypatch, [BARE], "--rows", "R9")[0] == 0  # its control need not be among them
    with pytest.raises(SystemExit) as stop:
        trust.main(["--rows", "R99"])
    assert stop.value.code == 2
