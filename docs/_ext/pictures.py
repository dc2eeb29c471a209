# SPDX-License-Identifier: Apache-2.0
"""Figures of docs/figures go into the page itself, so that they have the colours of its theme, light or dark.

Where the Markdown is read without a build, the same files are ordinary pictures with colours of their own.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

OWN = "figures/"
STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)


class Inlined(SphinxTransform):
    default_priority = 1  # before pictures are collected

    def apply(self, **_: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            if OWN in image["uri"] and image["uri"].endswith(".svg"):
                path = Path(self.env.srcdir) / OWN / Path(image["uri"]).name
                self.env.note_dependency(str(path))
                svg = STYLE.sub("", path.read_text(encoding="utf-8"))
                said = escape(image.get("alt", ""), quote=False)
                html = f'<figure class="figure">{svg}<figcaption>{said}</figcaption></figure>'
                image.replace_self(nodes.raw("", html, format="html"))


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(Inlined)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
