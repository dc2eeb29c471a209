# SPDX-License-Identifier: Apache-2.0
"""anabranch: safe, scalable transfer with dynamic experts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.report.result import Results

__version__ = "0.1.0"


def results(run: Any) -> "Results":
    """What a finished run found: its numbers, and tables that print, show in a notebook and draw themselves.

    `run` is the folder of measure, erase eval, align eval, a demo or a recipe, or the --out file of experts rank.
    """
    from anabranch.jobs.results import results as read  # nothing of it is loaded with the package

    return read(run)


def open_model(folder: Any, **options: Any) -> tuple[Any, Any]:
    """A steered, tuned or aligned language model and its tokenizer, as transformers knows them: see jobs.opening."""
    from anabranch.jobs import opening  # torch is imported here, and not with the package

    opened: tuple[Any, Any] = opening.open_model(folder, **options)
    return opened
