# SPDX-License-Identifier: Apache-2.0
"""How the documentation is built: `make docs`. Nothing is fetched; methods and results are read from this tree."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from anabranch import __version__  # noqa: E402

project = "anabranch"
author = "the anabranch developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "method_pages",
    "result_pages",
    "notebook_pages",
    "pictures",
]
exclude_patterns = ["_build", "_ext", "figures", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "anabranch"
html_static_path = ["_static"]
html_css_files = ["figures.css", "site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6f5c", "color-brand-content": "#1f6f5c"},
    "dark_css_variables": {"color-brand-primary": "#7fc4b5", "color-brand-content": "#7fc4b5"},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
