# SPDX-License-Identifier: Apache-2.0
"""What the pages say can be done: Python that runs, commands whose options and settings exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from anabranch import cli
from anabranch.cli.flags import parse
from anabranch.cli.options import FileAndSet, read
from anabranch.errors import UsageError
from tests.docs.pages import BLOCK, DOCS, ROOT, blocks, run

TOGETHER = ("erase", "align", "experts")
WRITTEN = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]


def commands(path: Path) -> list[str]:
    """Every call of anabranch in the command blocks of a page, comments and dots left out."""
    found = []
    for language, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language in ("bash", "console", "sh"):
            lines = text.replace("\\\n", " ").splitlines()
            found += [line.lstrip("$ ").split("  #")[0] for line in lines if re.match(r"\$? ?anabranch ", line)]
    return [line for line in found if "…" not in line]


def parsed(line: str) -> None:
    """Reads a command as the program would, up to where it would begin to work."""
    _, command, *rest = shlex.split(line)
    assert command in cli.COMMANDS, line
    if command in TOGETHER or (command == "data" and rest[0] == "icd"):
        sub, *rest = rest
        command = command if command == "data" else f"{command}_{sub}"
    flags = import_module(f"anabranch.cli.{command}").Flags
    try:
        (read if issubclass(flags, FileAndSet) else parse)(flags, rest, command)
    except UsageError as error:  # what has to be installed first may be shown all the same
        if "is not installed" not in str(error):
            raise


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_commands_have_the_options_that_they_are_shown_with(path):
    for line in commands(path):
        parsed(line)


def test_a_misspelt_option_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nanabranch measure --sauces a b  # wrong\n```\n", encoding="utf-8")
    (line,) = commands(page)
    with pytest.raises(Exception, match="no option --sauces"):
        parsed(line)


def played(page: str, *codes: str) -> list[tuple]:
    """Runs code one after the other in one place; what it would have printed."""
    said: list[tuple] = []
    space = {"print": lambda *what: said.append(what), "__name__": page}
    for code in codes:
        exec(compile(code, f"docs/{page}.md", "exec"), space)
    return said


def test_the_code_on_the_layer_runs_as_it_stands():
    """One block after the other, as a reader would type them."""
    said = played("layer", *blocks("layer", "python"))
    assert said[0] == ([0, 1, 0, 1],)  # the comment beside it says so


def test_a_model_of_your_own_takes_mixture_layers():
    first, *_ = blocks("bring-your-own", "python")
    assert played("bring-your-own", first) == [(["mlps.0", "mlps.1"],)]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["measuring", "pretraining"])
def test_the_same_from_python(page, tmp_path):
    run(["-c", blocks(page, "python")[-1]], tmp_path, ROOT / "src")


@pytest.mark.slow
def test_the_first_fifteen_minutes(tmp_path, monkeypatch):
    """Everything that the page tells its reader to type after the installation."""
    import subprocess
    import sys

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    script = "set -e\n" + "\n".join(blocks("first-steps", "bash"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = re.sub(r"\s+", " ", done.stdout)
    assert "garments: hurt by sharing" in told
    assert "digits: helped by sharing" in told
    assert run(["-c", blocks("first-steps", "python")[0]], tmp_path, ROOT / "src").split()[-1] == "ViTModel"
