# SPDX-License-Identifier: Apache-2.0
"""The published tables: every recipes/*/README.md is a page, and links from other pages to it lead there.

In the sources all links are those of files of the repository, so that they hold where the repository is read; what lies
outside docs/ and is no page is named in the built pages, but no link.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from written import Folder

FOLDER = "results"
LATER = ("trust",)
"""Pages that a command writes and that may not be there yet."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:|/)([^)\s]+)\)")


def write(docs: Path, root: Path) -> list[str]:
    """A page for each recipe, its pictures beside it; returns their names."""
    names = []
    with Folder(docs / FOLDER) as folder:
        for readme in sorted((root / "recipes").glob("*/README.md")):
            names.append(readme.parent.name)
            folder.write(f"{names[-1]}.md", moved(readme.read_text(encoding="utf-8"), readme, docs, root))
            for picture in readme.parent.glob("*.svg"):
                folder.kept.add(folder.path / picture.name)
                shutil.copy2(picture, folder.path / picture.name)
        folder.write("index.md", index(names))
    return names


def index(names: list[str]) -> str:
    tree = ["```{toctree}", "", *names, "```"]
    said = (
        "What was measured, how, and what was tried, failures included. Every page is the README of a folder under "
        "`recipes/`, where the commands stand that make its tables again."
    )
    return "\n".join(["# Published results", "", said, "", *tree, ""])


def moved(text: str, home: Path, docs: Path, root: Path) -> str:
    """The text with its links as they are from a page of the documentation."""
    return LINK.sub(lambda link: resolved(link, home, docs, root), text)


def resolved(link: re.Match[str], home: Path, docs: Path, root: Path) -> str:
    said, (target, _, fragment) = link[1], link[2].partition("#")
    path = Path(os.path.normpath(home.parent / target))
    if path.is_relative_to(docs) and path.exists():
        page = f"/{path.relative_to(docs).as_posix()}"
    elif path.name == "README.md" and path.parent.parent == root / "recipes":
        page = f"/{FOLDER}/{path.parent.name}.md"
    elif path.is_relative_to(root) and path.exists():
        return said if said.strip("`") == path.name else f"{said} (`{path.relative_to(root).as_posix()}`)"
    else:
        return link[0]  # the build complains of it
    return f"[{said}]({page}{'#' + fragment if fragment else ''})"


def source_read(app: Any, name: str, content: list[str]) -> None:
    home = Path(app.env.doc2path(name))
    for page in LATER if name == "index" else ():
        if not home.with_name(f"{page}.md").exists():
            content[0] = content[0].replace(f"\n{page}\n", "\n")
    if home.suffix == ".md" and not name.startswith(("methods/", f"{FOLDER}/")):
        content[0] = moved(content[0], home, Path(app.srcdir), Path(app.srcdir).parent)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: write(Path(app.srcdir), Path(app.srcdir).parent) and None)
    app.connect("source-read", source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
