# SPDX-License-Identifier: Apache-2.0
"""Run the notebooks and keep what they print: `python docs/notebooks/execute.py [NAME ...]`.

Of the outputs only what is printed is kept, without progress, speeds and pictures; temporary folders are called OUT.
So numbers that are the same leave the file as it is.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
TEMPORARY = re.compile(r"/\S*/anabranch-\w+")
SPEED = re.compile(r" +\d+ rows/s")


def executed(path: Path, cwd: Path, timeout: int = 600) -> Any:
    """The notebook after a run in that folder; the first cell that raises ends it."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(cwd)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where).execute()
    return notebook


def printed(cell: Any) -> str:
    outputs = cell.get("outputs", [])
    text = "".join(one["text"] for one in outputs if one["output_type"] == "stream" and one["name"] == "stdout")
    return SPEED.sub("", TEMPORARY.sub("OUT", text))


def keep(notebook: Any, path: Path) -> None:
    """Write it with its printed lines alone."""
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell.cell_type == "code":
            text = printed(cell)
            cell["execution_count"] = None
            cell["outputs"] = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def main(names: list[str]) -> None:
    for name in names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        keep(executed(path, Path.cwd()), path)


if __name__ == "__main__":
    main(sys.argv[1:])
