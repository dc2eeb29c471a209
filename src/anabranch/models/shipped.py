# SPDX-License-Identifier: Apache-2.0
"""Models that come with the package, by name: shipped:mixture, shipped:garments."""

from pathlib import Path

import anabranch
from anabranch.errors import UsageError, did_you_mean

PREFIX = "shipped:"
SHIPPED = {"mixture": "text_mixture", "garments": "garment_base"}
"""A small mixture-of-experts language model; a small diffusion model with a mark that nobody asked for."""


def folder_of(model: str | Path) -> Path:
    """The folder of a shipped model, or the path as it is.

    Raises:
        UsageError: no such shipped model.
    """
    name = str(model)
    if not name.startswith(PREFIX):
        return Path(model)
    name = name.removeprefix(PREFIX)
    if name not in SHIPPED:
        raise UsageError(f"there is no shipped model {name!r}", hint=did_you_mean(name, SHIPPED))
    return Path(anabranch.__file__).parent / "data" / SHIPPED[name]
