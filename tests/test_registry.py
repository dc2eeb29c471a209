# SPDX-License-Identifier: Apache-2.0
"""Cards are read from the head of a file; what is read is what Python itself would say the docstring is."""

import ast
from pathlib import Path

import pytest

import anabranch
from anabranch.registry import docstring_of

ROOT = Path(anabranch.__file__).parent


def test_every_docstring_of_the_package_is_read_as_python_reads_it():
    for path in ROOT.rglob("*.py"):
        assert docstring_of(path) == (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""), path


@pytest.mark.parametrize(
    "text",
    [
        '"""plain"""\n',
        '# a comment with """ in it\n\n"""after it"""\nx = 1\n',
        '"""two\n    lines, a \\"quote\\", an escape \\x41 and ""two""\n"""\n',
        'r"""raw \\d"""\n',
        "'single'\n",
        "'''three'''\n",
        'x = """no docstring"""\n',
        '"""joined""" + "x"\n',
        '"""with a comment"""  # behind it\n',
        '"""a""" "b"\n',
        "",
    ],
)
def test_unusual_heads(text, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(text)
    assert docstring_of(file) == (ast.get_docstring(ast.parse(text)) or "")
