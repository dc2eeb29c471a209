# SPDX-License-Identifier: Apache-2.0
"""The page on adding a method is followed to the letter, once in a package of its own and once in this repository."""

import re
from pathlib import Path

from tests.docs.pages import DOCS, ROOT, files, install, run, text_of

PAGE = "add-a-method"
METHOD, TEST = "my_methods/effective_experts.py", "tests/test_effective_experts.py"
LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"
WRITE_PAGES = (
    "import sys; sys.path.insert(0, sys.argv[1]); import method_pages; from pathlib import Path; "
    "method_pages.write(Path(sys.argv[2]), Path(sys.argv[3]))"
)


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def test_in_a_package_of_its_own(tmp_path):
    given = files(PAGE)
    assert list(given) == [METHOD, TEST, "pyproject.toml"]
    write(tmp_path, given)
    install(tmp_path)
    source = ROOT / "src"
    told = run(["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests"], tmp_path, tmp_path, source)
    assert re.search(r"[5-9] passed", told)

    listed = run(["-m", "anabranch", "list"], tmp_path, tmp_path, source)
    assert re.search(r"^effective_experts +How many experts are really used\?.*\[my-methods\]$", listed, re.MULTILINE)
    card = run(["-m", "anabranch", "list", "--method", "effective_experts"], tmp_path, tmp_path, source)
    assert "Hill 1973" in card

    run(["-c", WRITE_PAGES, str(DOCS / "_ext"), str(tmp_path / "docs"), str(ROOT)], tmp_path, tmp_path, source)
    page = (tmp_path / "docs/methods/others/effective_experts.md").read_text(encoding="utf-8")
    assert "[10.2307/1934352](https://doi.org/10.2307/1934352)" in page
    assert "D = exp(-sum_e f_e log f_e)" in page
    assert "(/methods/others/effective_experts.md)" in (tmp_path / "docs/methods/index.md").read_text(encoding="utf-8")


def moved(text: str) -> str:
    """As the page's table says: other places, another first line."""
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|$", text_of(PAGE).split("## In this repository")[1], re.MULTILINE)
    assert len(rows) == 4
    for old, new in rows[2:]:
        for one, other in zip(re.findall(r"`(.+?)`", old), re.findall(r"`(.+?)`", new), strict=True):
            text = text.replace(one, other)
    return LICENCE + text


def test_in_this_repository(tmp_path):
    """A copy of the package, two new files, and nothing else."""
    for path in (ROOT / "src").rglob("*.py"):
        write(tmp_path, {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")})
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_house.py"):
        write(tmp_path, {name: (ROOT / name).read_text(encoding="utf-8")})
    given = files(PAGE)
    new = {
        "src/anabranch/measure/effective_experts.py": moved(given[METHOD]),
        "tests/measure/test_effective_experts.py": moved(given[TEST]),
    }
    write(tmp_path, new)
    tests = ["tests/measure/test_effective_experts.py", "tests/test_house.py::test_arrows_between_rooms"]
    source = tmp_path / "src"
    told = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], tmp_path, source)
    assert re.search(r"\d\d passed", told)

    listed = run(["-m", "anabranch", "list", "--method", "measure/effective_experts"], tmp_path, source)
    assert "How many experts are really used?" in listed

    run(["-c", WRITE_PAGES, str(DOCS / "_ext"), str(tmp_path / "docs"), str(tmp_path)], tmp_path, source)
    page = (tmp_path / "docs/methods/measure/effective_experts.md").read_text(encoding="utf-8")
    assert "def test_contract():" in page  # the test that the card names stands on the page
    index = (tmp_path / "docs/methods/measure-index.md").read_text(encoding="utf-8")
    assert "effective_experts </methods/measure/effective_experts>" in index
