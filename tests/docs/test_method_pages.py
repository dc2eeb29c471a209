# SPDX-License-Identifier: Apache-2.0
"""Pages are made from cards: every method has one, a new file gets one, no number stands under another name."""

import sys

import pytest

from anabranch import registry
from tests.docs.pages import DOCS, ROOT

sys.path.insert(0, str(DOCS / "_ext"))

import method_pages
import published_rows
import result_pages

NEW = '''"""A *new* way to count, with a_subscript and a pipe | in it.

Paper     : Somebody 2020 (arXiv 2001.00001); see 1999.12345 and 10.1000/xyz-1.
Equation  : y = sum_t x_t
            z = y / T
Shapes    : T tokens.
Differs   : nothing.
Check     : by hand (tests/allocate/test_new.py).
Exempt    : samples (their order is what is measured)

Notes follow the card.
"""

raise RuntimeError("a page is made without importing its method")
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A package of one method, as the registry would find it, and its test."""
    package = tmp_path / "src/anabranch"
    for name, text in (("allocate/new.py", NEW), ("measure/helper.py", '"""No card."""\n')):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text(text, encoding="utf-8")
    test = tmp_path / "tests/allocate/test_new.py"
    test.parent.mkdir(parents=True)
    test.write_text('def test_by_hand():\n    """`"""\n    assert True\n', encoding="utf-8")
    monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
    return tmp_path


def written(tree, name):
    method_pages.write(tree / "docs", tree)
    return (tree / "docs/methods" / name).read_text(encoding="utf-8")


def test_a_new_file_gets_a_page_without_being_imported(tree):
    page = written(tree, "allocate/new.md")
    assert page.startswith("# allocate/new\n")
    assert "A \\*new\\* way to count, with a\\_subscript and a pipe \\| in it." in page  # text, and no markup
    for number in ("2001.00001", "1999.12345"):
        assert f"(https://arxiv.org/abs/{number})" in page
    assert "[10.1000/xyz-1](https://doi.org/10.1000/xyz-1)" in page
    assert "y = sum_t x_t\nz = y / T\n" in page  # lines as they were written
    assert "## Exempt from the contract\n\nsamples (their order is what is measured)" in page
    assert "## Notes\n\nNotes follow the card." in page
    assert "## Measured" not in page


def test_the_name_of_the_test_leads_to_it(tree):
    page = written(tree, "allocate/new.md")
    assert "[tests/allocate/test\\_new.py](#allocate-new-tests-allocate-test-new-py)" in page
    assert "(allocate-new-tests-allocate-test-new-py)=" in page
    assert "def test_by_hand():" in page


def test_indices_hold_it_and_helpers_have_no_page(tree):
    assert "new </methods/allocate/new>" in written(tree, "allocate-index.md")
    index = written(tree, "index.md")
    assert index.startswith("# All methods\n\n1 methods.")
    assert "helper" not in index


def test_what_is_gone_loses_its_page(tree):
    written(tree, "allocate/new.md")
    (tree / "src/anabranch/allocate/new.py").unlink()
    method_pages.write(tree / "docs", tree)
    assert not (tree / "docs/methods/allocate/new.md").exists()


def test_a_page_that_says_the_same_is_left_alone(tree):
    written(tree, "allocate/new.md")
    page = tree / "docs/methods/allocate/new.md"
    before = page.stat().st_mtime_ns
    written(tree, "allocate/new.md")
    assert page.stat().st_mtime_ns == before


def test_every_method_has_a_page_with_its_source():
    found = method_pages.methods()
    own = {method.key for method in found if method.package == "anabranch"}
    assert own == set(registry.cards())
    assert len({method.page for method in found}) == len(found)
    for method in found:
        if method.package == "anabranch":
            page = method_pages.page_of(method, ROOT)
            assert "## Test" in page, method.key
            assert method.source.read_text(encoding="utf-8").splitlines()[-1] in page, method.key


TABLE = """# Results

### Pruning: half

| method | target |
| --- | --- |
| naee | +0.3 |
| naee_else | +9 |
| random | +1.4 |

### Skipping slots

| method | target |
| --- | --- |
| naee (24 % of the slots) | +0.005 |

| another | table |
"""


def test_rows_are_found_by_the_whole_name_in_the_right_table(tmp_path):
    readme = tmp_path / "recipes/experts/README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text(TABLE, encoding="utf-8")
    (pruning,) = published_rows.rows_of("reuse/prune/naee", tmp_path)
    assert pruning.lines == ["| method | target |", "| --- | --- |", "| naee | +0.3 |", "| random | +1.4 |"]
    (skipping,) = published_rows.rows_of("reuse/skip/naee", tmp_path)
    assert skipping.lines[2:] == ["| naee (24 % of the slots) | +0.005 |"]
    assert published_rows.rows_of("reuse/prune/premoe", tmp_path) == []
    assert published_rows.rows_of("specialize/mae", tmp_path) == []


def test_every_table_that_is_named_is_there():
    """A heading that was renamed would silently take the numbers off the pages."""
    for one in published_rows.TABLES:
        title, table = published_rows.under((ROOT / one.file).read_text(encoding="utf-8"), one.heading)
        assert len(table) > 2, (one.file, title)
        if isinstance(one.methods, dict):
            assert set(one.methods) <= set(registry.cards())
            for name in one.methods.values():
                assert any(published_rows.bears(row[0], name) for row in table), (one.file, name)


def test_links_hold_on_the_page_as_in_the_repository(tmp_path):
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    (tmp_path / "recipes/moce").mkdir(parents=True)
    for name in ("docs/here.md", "docs/lab.md", "recipes/moce/README.md", "recipes/moce/recipe.py"):
        (tmp_path / name).touch()

    def moved(text, home):
        return result_pages.moved(text, tmp_path / home, tmp_path / "docs", tmp_path)

    assert moved("[d](../../docs/lab.md#x)", "recipes/moce/README.md") == "[d](/lab.md#x)"
    assert moved("[t](../recipes/moce/README.md)", "docs/here.md") == "[t](/results/moce.md)"
    assert moved("[r](../recipes/moce/recipe.py)", "docs/here.md") == "r (`recipes/moce/recipe.py`)"
    assert moved("[p](https://arxiv.org/abs/1)", "docs/here.md") == "[p](https://arxiv.org/abs/1)"
    assert moved("[gone](nowhere.md)", "docs/here.md") == "[gone](nowhere.md)"  # the build is to complain
