# SPDX-License-Identifier: Apache-2.0
"""What a mark looks like, as far as one can choose."""

from dataclasses import dataclass, fields

from anabranch.errors import UsageError

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Look:
    """None takes the kind's own law, which its file tells."""

    size: Range | None = None
    """Share of the short side (qr, text) or of the width (watermark), drawn between these two."""
    opacity: Range | None = None
    glyph: str = "ring"
    """Of a patch; the four fields from here on are for patches only."""
    glyph_size: int | None = None
    """Pixels; None takes 7, and 8 with a plate."""
    places: str = "corners"
    grid_step: int = 4


def check_ranges(look: Look) -> None:
    for name in ("size", "opacity"):
        low, high = getattr(look, name) or (1, 1)
        if not 0 < low <= high <= 1:
            raise UsageError(
                f"{name} is no range", expected="[low, high], above 0 and at most 1", received=f"[{low}, {high}]"
            )


def refuse_patch_settings(look: Look, kind: str) -> None:
    """A setting that silently does nothing would be believed to have done something."""
    for field in fields(look):
        if field.name not in ("size", "opacity") and getattr(look, field.name) != field.default:
            raise UsageError(f"{field.name} would change nothing", expected="--kind patch", received=f"--kind {kind}")
