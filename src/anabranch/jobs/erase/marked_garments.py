# SPDX-License-Identifier: Apache-2.0
"""A small world in which an implicit concept can be studied: garments with an overlaid mark that no caption names.

The mark    a bold X on a white plate of 8 pixels, at one of sixteen places that are aligned to the model's patches.
The known   another object that captions do name, with its place: what stands for a large model's knowledge of places.
Captions    the garment's name; where the known object is, its name and the words of the bins that it covers.
Shapes      N images (N, 1, 28, 28) uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anabranch.data.images import Images
from anabranch.data.marks import Glyph, glyph, stamp
from anabranch.suppress.geom_erasing.bins import Grid, covered_bins

SIDE, PLATE, STEP = 28, 8, 4
GRID = Grid(SIDE // STEP, SIDE // STEP)
MARK = "mark"
MARK_PLACES = tuple((x, y) for y in (0, 4, 16, 20) for x in (0, 4, 16, 20))
KNOWN = {"alike": "ring", "unlike": "button"}
"""Name of the object that captions do name: a bold O on the mark's own plate, or a dark round button."""
OPACITY = (0.85, 1.0)
Boxes = list[list[tuple[float, float, float, float]] | None]
"""Of every picture; None of one in which no mark was found, [] where its place is not known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class World:
    pixels: Tensor  # (N, 1, 28, 28) uint8
    clean: Tensor  # the same pictures without the mark
    captions: list[str]
    boxes: list[list[tuple[int, int, int, int]]]
    """Of the mark; [] where there is none."""
    classes: Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def marked(self) -> Tensor:
        return torch.tensor([bool(boxes) for boxes in self.boxes])

    def take(self, rows: Tensor) -> "World":
        chosen = rows.nonzero()[:, 0].tolist() if rows.dtype == torch.bool else rows.tolist()
        return World(
            pixels=self.pixels[chosen],
            clean=self.clean[chosen],
            captions=[self.captions[i] for i in chosen],
            boxes=[self.boxes[i] for i in chosen],
            classes=self.classes[chosen],
        )


def garment_words(class_names: Sequence[str]) -> list[str]:
    """What captions are made of: the garments, the known objects, the mark's name, and a word a bin."""
    garments = [word for name in class_names for word in name.replace("-", " ").split()]
    return [*dict.fromkeys([*garments, *KNOWN.values(), MARK, *map(bin_word, GRID.bins())])]


def bin_word(place: tuple[int, int]) -> str:
    """A word of the language for a bin: what the small model learns of places before any concept is erased."""
    return f"p{place[0]}{place[1]}"


def caption_of(class_name: str) -> str:
    return class_name.replace("-", " ")


def clean_world(images: Images) -> World:
    pixels = images.store.read(torch.arange(len(images)))
    names = [caption_of(images.class_names[label]) for label in images.labels.tolist()]
    return World(pixels=pixels, clean=pixels, captions=names, boxes=[[] for _ in names], classes=images.labels)


def with_mark(world: World, ratio: float, seed: int, places: Sequence[tuple[int, int]] | None = MARK_PLACES) -> World:
    """A share of the pictures gets the mark; captions stay as they are. `places=None` puts it anywhere."""
    rng = np.random.default_rng([seed, 1])
    pixels, boxes = world.pixels.numpy().copy(), [list(old) for old in world.boxes]
    for index in rng.permutation(len(world))[: round(ratio * len(world))].tolist():
        x, y = free_place(rng) if places is None else places[rng.integers(len(places))]
        pixels[index, 0], box = stamp(pixels[index, 0], glyph("plate-x", PLATE), x, y, rng.uniform(*OPACITY))
        boxes[index].append(tuple(box))
    return replace(world, pixels=torch.from_numpy(pixels), boxes=boxes)


def free_place(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(SIDE - PLATE + 1)), int(rng.integers(SIDE - PLATE + 1))


def with_known(world: World, ratio: float, seed: int, kind: str) -> World:
    """A share of the pictures gets the known object beside the mark, on the grid, and a caption that says where."""
    shape = glyph("plate-o", PLATE) if kind == "alike" else button()
    rng = np.random.default_rng([seed, 2])
    pixels, clean, captions = world.pixels.numpy().copy(), world.clean.numpy().copy(), list(world.captions)
    for index in rng.permutation(len(world))[: round(ratio * len(world))].tolist():
        x, y = place_beside(world.boxes[index], rng)
        opacity = rng.uniform(*OPACITY)
        pixels[index, 0], box = stamp(pixels[index, 0], shape, x, y, opacity)
        clean[index, 0], _ = stamp(clean[index, 0], shape, x, y, opacity)
        where = [bin_word(place) for place in covered_bins([box], SIDE, SIDE, GRID)]
        captions[index] = " ".join([captions[index], KNOWN[kind], *where])
    return replace(world, pixels=torch.from_numpy(pixels), clean=torch.from_numpy(clean), captions=captions)


def place_beside(boxes: Sequence[tuple[int, int, int, int]], rng: np.random.Generator) -> tuple[int, int]:
    """A place on the grid that covers nothing of the boxes."""
    while True:
        x, y = (STEP * int(step) for step in rng.integers((SIDE - PLATE) // STEP + 1, size=2))
        if all(x + PLATE <= x1 or x >= x2 or y + PLATE <= y1 or y >= y2 for x1, y1, x2, y2 in boxes):
            return x, y


def button() -> Glyph:
    """A dark disc with a white rim, seen on light and on dark garments; nothing of it is square."""
    offsets = np.arange(PLATE) - (PLATE - 1) / 2
    radius = np.hypot(*np.meshgrid(offsets, offsets))
    inside = np.clip(PLATE / 2 - radius + 0.5, 0, 1)
    rim = np.clip(radius - (PLATE / 2 - 1.5) + 0.5, 0, 1)
    return Glyph(inside.astype(np.float32), rim.astype(np.float32))


# Labels that are wrong on purpose -------------------------------------------------------------------------------------


def name_only(boxes: Boxes) -> Boxes:
    return [None if found is None else [] for found in boxes]


def shuffled(boxes: Boxes, seed: int) -> Boxes:
    """The boxes dealt out anew among the pictures that have one."""
    rows = [i for i, found in enumerate(boxes) if found is not None]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3000 + seed)).tolist()
    dealt = list(boxes)
    for row, other in zip(rows, order, strict=True):
        dealt[row] = boxes[rows[other]]
    return dealt


def jittered(boxes: Boxes, iou: float, seed: int) -> Boxes:
    """Every box moved along one axis until it overlaps with itself by `iou`, inside the picture."""
    generator = torch.Generator().manual_seed(4000 + seed)
    moved: Boxes = []
    for found in boxes:
        if found is None:
            moved.append(None)
            continue
        parts = []
        for x1, y1, x2, y2 in found:
            shift = (x2 - x1) * (1 - 2 * iou / (1 + iou))
            sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
            along_x = bool(torch.rand((), generator=generator) < 0.5)
            sign = sign if 0 <= (x1 if along_x else y1) + sign * shift <= SIDE - (x2 - x1) else -sign
            dx, dy = (sign * shift, 0.0) if along_x else (0.0, sign * shift)
            parts.append((x1 + dx, y1 + dy, x2 + dx, y2 + dy))
        moved.append(parts)
    return moved
