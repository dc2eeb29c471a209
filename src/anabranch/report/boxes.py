# SPDX-License-Identifier: Apache-2.0
"""Images with what was found in them: boxes around a concept, the same seeds under several models, attention maps."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from anabranch.report.page import Figure, Table
from anabranch.report.sheets import GAP, as_rgb, montage
from anabranch.report.text import MISSING, level

Boxes = Sequence[Sequence[Sequence[float]]]
"""For each image its boxes (x1, y1, x2, y2) in pixels of that image."""

LARGEST, PAGE, STRIP = (
    96,
    1080,
    880,
)  # pixels: an image's longer side, the width of a sheet, that of a row after its name
LINE, HALO = (255, 122, 20), (16, 19, 22)  # bright on dark images, dark on bright ones, so that one of them shows
HEAT = "cividis"  # from dark blue to yellow, read alike with and without colour vision


def as_pixels(images: ArrayLike) -> NDArray[np.uint8]:
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images: expected uint8 (n, 1 or 3, H, W), received {pixels.dtype} {pixels.shape}")
    return pixels.transpose(0, 2, 3, 1)


def shown_size(height: int, width: int, columns: int, room: int) -> tuple[int, int]:
    """(height, width) to draw at: small images grow by whole pixels, as far as `columns` of them fit the room."""
    most = min(LARGEST, room // columns - GAP)
    longest = max(height, width)
    scale = max(1, most // longest) if longest <= LARGEST else LARGEST / longest
    return max(1, round(height * scale)), max(1, round(width * scale))


def enlarge(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """One image (H, W, C) in colour at a size; whole pixels when it grows, a mean of them when it shrinks."""
    how = Image.Resampling.NEAREST if size[0] >= image.shape[0] else Image.Resampling.LANCZOS
    return np.array(as_rgb(image).resize(size[::-1], how))


def frame(image: NDArray[np.uint8], box: Sequence[float], scale: tuple[float, float]) -> None:
    """Draw one box into an enlarged image: a bright line just outside it, with a dark one around that."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = box
    left, right = round(x1 * scale[1]), round(x2 * scale[1]) - 1
    top, bottom = round(y1 * scale[0]), round(y2 * scale[0]) - 1
    for distance, color in ((2, HALO), (1, LINE)):
        up, down = max(top - distance, 0), min(bottom + distance, height - 1)
        start, stop = max(left - distance, 0), min(right + distance, width - 1)
        image[[up, down], start : stop + 1] = color
        image[up : down + 1, [start, stop]] = color


def with_boxes(
    images: NDArray[np.uint8], boxes: Boxes | None, size: tuple[int, int], unit: tuple[int, int]
) -> NDArray[np.uint8]:
    """Images (n, H, W, C) as (n, 3, *size), with boxes drawn in that count in pixels of an image of size `unit`."""
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"boxes: expected {len(images)} lists, one an image, received {len(boxes)}")
    drawn = np.zeros((len(images), *size, 3), np.uint8)
    for index, image in enumerate(images):
        drawn[index] = enlarge(image, size)
        for box in () if boxes is None else boxes[index]:
            check_box(box, *unit)
            frame(drawn[index], box, (size[0] / unit[0], size[1] / unit[1]))
    return drawn.transpose(0, 3, 1, 2)


def drawn_images(images: ArrayLike, boxes: Boxes | None, columns: int, room: int) -> NDArray[np.uint8]:
    """Images (n, C, H, W) as the page shows them, `columns` of them in the room."""
    pixels = as_pixels(images)
    unit = pixels.shape[1:3]
    return with_boxes(pixels, boxes, shown_size(*unit, columns, room), unit)


def check_box(box: Sequence[float], height: int, width: int) -> None:
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(f"boxes: expected 0 <= x1 < x2 <= {width}, 0 <= y1 < y2 <= {height}, received {tuple(box)}")


def sheet(drawn: NDArray[np.uint8], columns: int, alt: str) -> Markup:
    """A montage that keeps its size: shrunk to a narrow screen its lines would be lost, so it scrolls."""
    width = min(columns, max(len(drawn), 1)) * (drawn.shape[3] + GAP) - GAP
    picture = montage(drawn, columns, alt, shown_height=drawn.shape[2])
    return Markup('<div style="width:{}px">{}</div>').format(width, picture)


def written(boxes: Sequence[Sequence[float]]) -> str:
    """Corners in pixels: "12,4–20,12"; an en dash without a box."""
    corners = [[f"{float(edge):.4g}" for edge in box] for box in boxes]
    return "; ".join(f"{x1},{y1}–{x2},{y2}" for x1, y1, x2, y2 in corners) or MISSING


def boxed_sheet(
    images: ArrayLike, boxes: Boxes, title: str, columns: int = 10, *, labels: Sequence[str] | None = None
) -> Figure:
    """Images (n, C, H, W) in reading order with their boxes; corners and labels are listed in the table."""
    drawn = drawn_images(images, boxes, columns, PAGE)
    count = len(drawn)
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count}, one an image, received {len(labels)}")
    found = sum(bool(len(several)) for several in boxes)
    alt = f"{title}: contact sheet of {count} images, {found} of them with a box."
    columns_named = ["image", *(["label"] if labels is not None else []), "boxes"]
    names = [[label] for label in labels] if labels is not None else [[]] * count
    rows = [[index, *name, written(b)] for index, (name, b) in enumerate(zip(names, boxes, strict=True), start=1)]
    return Figure(sheet(drawn, columns, alt), title, alt, Table(title, columns_named, rows))


def named_rows(rows: Sequence[tuple[str, Markup]]) -> Markup:
    """Pictures one under the other, each with its name at the left."""
    name = Markup('<p style="margin:0;font-size:.85rem;line-height:1.35;text-align:right">{}</p>')
    body = Markup("").join(name.format(label) + picture for label, picture in rows)
    grid = "display:grid;grid-template-columns:minmax(5rem,10rem) max-content;gap:.45rem 1rem;align-items:center"
    return Markup('<div style="{}">{}</div>').format(grid, body)


def strips(rows: Sequence[tuple[str, ArrayLike, Boxes | None]], title: str) -> Figure:
    """The same seeds under several models, one named row a model; columns are seeds.

    Args:
        rows: name, images uint8 (n, C, H, W) and their boxes (None where nobody looked); n, H and W agree in all rows.
    """
    shapes = {(len(pixels), *pixels.shape[2:]) for pixels in (np.asarray(images) for _, images, _ in rows)}
    if len(shapes) > 1:
        raise ValueError(f"rows: expected as many images of one size in each, received {sorted(shapes)}")
    pictures, listed, said = [], [], []
    for name, images, boxes in rows:
        drawn = drawn_images(images, boxes, max(len(np.asarray(images)), 1), STRIP)
        found = None if boxes is None else sum(bool(len(several)) for several in boxes)
        said.append(f"{name}, {MISSING if found is None else found} of {len(drawn)} with a box")
        pictures.append((name, sheet(drawn, max(len(drawn), 1), said[-1])))
        listed.append([name, len(drawn), found, None if boxes is None else sum(map(len, boxes))])
    return Figure(
        svg=named_rows(pictures),
        caption=title,
        alt=f"{title}, rows of images from the same seeds: {'; '.join(said) or 'no rows'}.",
        table=Table(title, ["row", "images", "images with a box", "boxes"], listed),
        notes=["Each column starts from the same noise. A frame: the detector found the concept there."],
    )


def heat(maps: NDArray[np.float64], highest: float) -> NDArray[np.uint8]:
    """Maps (n, h, w) in colour (n, h, w, 3), from 0 to `highest`."""
    return np.asarray(matplotlib.colormaps[HEAT](maps / (highest or 1.0), bytes=True)[..., :3])


def heat_ramp() -> Markup:
    stops = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](share)) for share in np.linspace(0, 1, 7))
    scale = '<div class="ramp">0 <i style="background:linear-gradient(90deg, {})"></i> largest of the row</div>'
    return Markup(scale).format(stops)


def heat_strip(
    images: ArrayLike, maps: Sequence[tuple[str, ArrayLike]], title: str, boxes: Boxes | None = None
) -> Figure:
    """A row of images, and under it a named row for each set of maps (n, h, w), at least 0; boxes frame both."""
    drawn = drawn_images(images, boxes, max(len(np.asarray(images)), 1), STRIP)
    count, size, unit = len(drawn), drawn.shape[2:], np.asarray(images).shape[2:]
    pictures, listed = [("images", sheet(drawn, max(count, 1), f"{title}, images"))], []
    for name, values in maps:
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.ndim != 3 or len(numbers) != count or not np.isfinite(numbers).all() or (numbers < 0).any():
            raise ValueError(f"{name}: expected maps ({count}, h, w) of at least 0, received {numbers.shape}")
        highest = float(numbers.max(initial=0.0))
        row = with_boxes(heat(numbers, highest), boxes, size, unit)
        pictures.append((name, sheet(row, max(count, 1), f"{title}, {name}")))
        listed.append([name, count, "×".join(map(str, numbers.shape[1:])), level(highest, 3)])
    said = "; ".join(f"{name} up to {highest}" for name, _, _, highest in listed)
    return Figure(
        svg=named_rows(pictures) + heat_ramp(),
        caption=title,
        alt=f"{title}: {count} images and under them maps: {said or 'none'}.",
        table=Table(title, ["map", "images", "cells", "largest"], listed),
        notes=["Each row has its own scale, from 0 to its largest value."],
    )
