# SPDX-License-Identifier: Apache-2.0
"""What `anabranch data icd` can be told. Light on purpose: the command line reads this without importing torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["qr", "watermark", "text", "patch"]


@dataclass(frozen=True, kw_only=True)
class IcdFlags:
    images: str = ""
    """A folder of images, any sizes and nesting, with captions or without; or patchwork:NAME."""
    kind: Kind = "watermark"
    """What is put on them; patch is for small images, qr needs anabranch[erase]."""
    ratio: float = 0.7
    """Share of the images that get it."""
    out: Path = Path("icd")
    """The folder to write: images/, clean/ (the same without marks) and what tells them apart."""
    seed: int = 0
    """Which images, and what each mark looks like."""


@dataclass(frozen=True, kw_only=True)
class IcdSettings(IcdFlags):
    caption: str = "a photo of a {class}"
    """For images in class folders that come without captions."""
    max_images: int | None = None
    """At most so many images, chosen at random; all of them by default."""
    size: tuple[float, float] | None = None
    """Range of the mark's size, as a share of the image's short side (watermark: its width); None takes the kind's."""
    opacity: tuple[float, float] | None = None
    """Range of the mark's opacity; None takes the kind's."""
    glyph: Literal["ring", "cross", "plate-x", "plate-o"] = "ring"
    """The next four are for --kind patch. plate-x and plate-o: the black letter on a white plate."""
    glyph_size: int | None = None
    """Pixels; None takes 7, and 8 with a plate."""
    places: Literal["corners", "any", "grid"] = "corners"
    """corners: 70 % of them near a corner; any: anywhere; grid: at multiples of grid_step."""
    grid_step: int = 4
    """Pixels; the patch size of a model puts the glyph where the model cuts."""
