# SPDX-License-Identifier: Apache-2.0
"""The whole documentation is built without a warning, and without anything from elsewhere."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT

LOADED = re.compile(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["'](https?:[^"']+)""")
FIGURE = re.compile(r'<svg class="anabranch-figure".*?</svg>', re.DOTALL)


@pytest.mark.slow
def test_the_build_has_no_warning_and_pages_load_nothing_from_elsewhere(tmp_path):
    kept = shutil.ignore_patterns("_build", "methods", "results")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=kept)
    for name in ("src", "tests", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    out = tmp_path / "html"
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(tmp_path / "docs"), str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = list(out.rglob("*.html"))
    assert len(pages) > 120
    for page in pages:
        assert not LOADED.findall(page.read_text(encoding="utf-8")), page
    figures = FIGURE.findall((out / "layer.html").read_text(encoding="utf-8"))
    assert len(figures) == 5
    assert not [figure for figure in figures if "<style" in figure]  # colours follow the page's own switch
