# SPDX-License-Identifier: Apache-2.0
"""The mistakes that scripts/mutants.py plants are mistakes: each is another program, and none is a broken file."""

import ast
from pathlib import Path

import pytest

import anabranch
from tests.many import load

ROOM = Path(anabranch.__file__).parent / "mixture"
mutants = load(Path(__file__).parent.parent / "scripts" / "mutants.py")


def test_every_mistake_is_another_program_that_python_can_read():
    file = ROOM / "losses.py"
    text, known = file.read_text(), mutants.mistakes(ROOM, ["losses.py"])
    programs = [mutants.spoilt(text, mistake)[0] for mistake in known]
    assert all(ast.unparse(ast.parse(program)) != ast.unparse(ast.parse(text)) for program in programs)
    assert len(set(programs)) == len(programs) > 30


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if a < b: x()", {"if a <= b:", "if not a < b:", "pass"}),
        ("x = not a and b", {"x = not a or b", "x = a and b"}),
        ("if not a: x()", {"if a:", "pass"}),
        ("y = x[-1] + 2 * k", {"y = x[-1] - 2 * k", "y = x[+1] + 2 * k", "y = x[-2] + 2 * k", "y = x[-1] + 2 / k",
                               "y = x[-1] + 3 * k"}),
        ("def f(a: 'int | None' = 1) -> 'x | y': raise E", {"def f(a: 'int | None'=2) -> 'x | y':", "pass"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    a = 1 + 1", set()),
        ("'A docstring of 3 words.'", set()),
    ],
)  # fmt: skip
def test_what_is_spoilt_and_what_is_no_code(tmp_path, before, after):
    (tmp_path / "one.py").write_text(before)
    lines = [mutants.spoilt(before, mistake)[1] for mistake in mutants.mistakes(tmp_path, [])]
    assert sorted(line.partition("->  ")[2] for line in lines) == sorted(after)
