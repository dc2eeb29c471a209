# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: many small images as one picture, and a card for each group of a clustering."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from anabranch.report.page import Figure, Table
from anabranch.report.text import MISSING, cell, is_missing

LARGEST = 96  # pixels of a thumbnail's longer side; larger images are scaled down before they go into the page
GAP = 2


@dataclass(frozen=True, kw_only=True)
class ClusterSheet:
    """What a card shows of one group of images; images are uint8 (n, C, H, W)."""

    name: str
    size: int
    nearest: ArrayLike
    border: ArrayLike
    random: ArrayLike
    labels: Sequence[tuple[str, float]] = ()
    """Classes found in the group with their lift: how much commoner they are here than in all images."""
    purity: float | None = None
    sibling: str | None = None


def as_images(images: ArrayLike) -> NDArray[np.uint8]:
    """Images as (n, H, W, C), checked and scaled down to thumbnails."""
    pixels = np.asarray(images)
    if pixels.size == 0:
        return np.zeros((0, 1, 1, 1), np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images: expected uint8 (n, 1 or 3, H, W), received {pixels.dtype} {pixels.shape}")
    pixels = pixels.transpose(0, 2, 3, 1)
    height, width = pixels.shape[1:3]
    if max(height, width) <= LARGEST:
        return pixels
    scale = LARGEST / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(as_rgb(image).resize(size, Image.Resampling.LANCZOS)) for image in pixels])


def as_rgb(pixels: NDArray[np.uint8]) -> Image.Image:
    """One image (H, W, 1 or 3) in colour."""
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))


def montage(images: ArrayLike, columns: int, alt: str, *, shown_height: int = 56) -> Markup:
    """One PNG inside the page, images row by row with clear gaps; small images are enlarged by whole pixels."""
    pixels = as_images(images)
    count, height, width, channels = pixels.shape
    if count == 0:
        return Markup("<p>{}</p>").format(MISSING)
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels + 1), np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        sheet[top : top + height, left : left + width, :channels] = image
        sheet[top : top + height, left : left + width, channels] = 255
    png = BytesIO()
    Image.fromarray(sheet).save(png, "PNG", optimize=True)
    zoom = max(1, round(shown_height / height))
    source = b64encode(png.getvalue()).decode()
    return Markup('<img class="sheet" src="data:image/png;base64,{}" width="{}" height="{}" alt="{}">').format(
        source, sheet.shape[1] * zoom, sheet.shape[0] * zoom, alt
    )


def contact_sheet(images: ArrayLike, title: str, columns: int = 12, *, labels: Sequence[str] | None = None) -> Figure:
    """Images (n, C, H, W) in reading order; labels, one an image, are listed in the table."""
    count, channels, height, width = np.asarray(images).shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count}, one an image, received {len(labels)}")
    alt = f"{title}: contact sheet of {count} images in rows of {min(columns, max(count, 1))}."
    if labels is None:
        table = Table(title, ["images", "width", "height", "channels"], [[count, width, height, channels]])
    else:
        table = Table(title, ["image", "label"], list(enumerate(labels, start=1)))
    return Figure(montage(images, columns, alt), title, alt, table)


def lift(labels: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} ×{cell(MISSING if is_missing(value) else round(value, 1))}" for name, value in labels)


def card(sheet: ClusterSheet, columns: int) -> Markup:
    strips = Markup("").join(
        Markup('<div class="strip"><p>{}</p>{}</div>').format(
            word, montage(images, columns, f"{sheet.name}, {word}", shown_height=28)
        )
        for word, images in (("nearest", sheet.nearest), ("border", sheet.border), ("random", sheet.random))
    )
    facts = [f"purity {MISSING if is_missing(sheet.purity) else f'{sheet.purity:.2f}'}"]
    facts += [f"nearest sibling {sheet.sibling}"] if sheet.sibling else []
    head = Markup('<p class="name">{}<span>{} images</span></p><p>{}</p>')
    tail = Markup('<p class="facts">{}</p>').format(" · ".join(facts))
    body = head.format(sheet.name, cell(sheet.size), lift(sheet.labels) or MISSING) + strips + tail
    return Markup('<div class="card">{}</div>').format(body)


def cluster_sheets(sheets: Sequence[ClusterSheet], title: str = "The groups", columns: int = 8) -> Figure:
    """A card for each group: who is typical, who is at the border, who is there at all."""
    rows = [[s.name, s.size, lift(s.labels) or None, s.purity, s.sibling] for s in sheets]
    return Figure(
        svg=Markup('<div class="cards">{}</div>').format(Markup("").join(card(sheet, columns) for sheet in sheets)),
        caption=title,
        alt=f"{title}: contact sheets of {len(sheets)} groups with nearest, border and random images.",
        table=Table(title, ["group", "images", "labels and lift", "purity", "nearest sibling"], rows),
        notes=["×4.2 after a label: it is 4.2 times as common in the group as in all images."],
    )
