# SPDX-License-Identifier: Apache-2.0
"""Notebooks as pages: text, code, and what little output is kept in them. They are not run by the build."""

import json
import re
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser


class NotebookParser(MystParser):
    supported = ("ipynb",)

    def parse(self, inputstring: str, document: Any) -> None:
        super().parse(markdown_of(json.loads(inputstring)), document)


def markdown_of(notebook: dict[str, Any]) -> str:
    return "\n\n".join(part for cell in notebook["cells"] for part in parts_of(cell)) + "\n"


def parts_of(cell: dict[str, Any]) -> list[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [text]
    return [block(text, "python"), *(block(said, "text") for said in map(said_by, cell["outputs"]) if said)]


def block(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def said_by(output: dict[str, Any]) -> str:
    """The text of an output; pictures are not kept in notebooks."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


def setup(app: Any) -> dict[str, bool]:
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
