# SPDX-License-Identifier: Apache-2.0
"""Marks on images: small glyphs as arrays, where they go, and stamping them so that the box tells exactly what changed.

Equation  : x' = x + o a (255 v - x), rounded; a the mark's alpha, v its value (0 black, 1 white), o its opacity.
Box       : half-open pixels [x1, x2) x [y1, y2): the smallest that holds every pixel which the mark can change,
            whatever the image. Outside it all pixels stay as they are, to the bit.
Glyphs    : ring, cross: white strokes on nothing. plate-x, plate-o: a bold black X or O on a white plate.
Places    : corners: 70 % in one of four corners, 2-5 % of the short side from the edges, else anywhere. any: anywhere.
            grid: at multiples of a step, so that a patch of a model sees the glyph always in the same way.
Shapes    : H x W pixels, with C channels or none; alpha (H, W); value (H, W), or (H, W, 3) for a coloured mark.
Check     : the box is tight and the rest untouched for every glyph, place and opacity (tests/data/test_marks.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from anabranch.errors import UsageError, did_you_mean

GLYPHS = ("ring", "cross", "plate-x", "plate-o")
PLACES = ("corners", "any", "grid")
LEAST_GLYPH = 5
CORNER_SHARE, MARGINS = 0.7, (0.02, 0.05)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Box(NamedTuple):
    x1: int
    y1: int
    x2: int
    y2: int


class Glyph(NamedTuple):
    alpha: np.ndarray  # (H, W) float32 in 0..1
    value: np.ndarray  # (H, W) or (H, W, 3) float32 in 0..1


class Place(NamedTuple):
    x: int
    y: int


class Placed(NamedTuple):
    glyph: Glyph
    x: int
    y: int


class Layer(NamedTuple):
    mask: np.ndarray  # (H, W) in 0..1
    colour: tuple[float, float, float]
    alpha: float = 1.0


def glyph(name: str, size: int) -> Glyph:
    """A square glyph of `size` pixels."""
    if name not in GLYPHS:
        raise UsageError(f"there is no glyph {name!r}", expected=", ".join(GLYPHS), hint=did_you_mean(name, GLYPHS))
    if size < LEAST_GLYPH:
        raise UsageError("the glyph is too small", expected=f"at least {LEAST_GLYPH} pixels", received=size)
    y_SS, x_SS = np.mgrid[:size, :size] - (size - 1) / 2
    radius_SS = np.hypot(x_SS, y_SS)
    stroke = max(1.5, 0.2 * size)
    if name == "ring":
        alpha_SS = ring(radius_SS, size / 2, stroke)
    elif name == "cross":
        alpha_SS = inside(stroke / 2 - np.minimum(abs(x_SS), abs(y_SS)))
    elif name == "plate-o":
        ink_SS = ring(radius_SS, size / 2 - 1, stroke)
    else:
        diagonal_SS = np.minimum(abs(x_SS - y_SS), abs(x_SS + y_SS)) / np.sqrt(2)
        ink_SS = np.minimum(inside(stroke / 2 - diagonal_SS), np.maximum(abs(x_SS), abs(y_SS)) < size / 2 - 1)
    if name in ("ring", "cross"):
        return Glyph(alpha_SS.astype(np.float32), np.ones((size, size), np.float32))
    return Glyph(np.ones((size, size), np.float32), (1 - ink_SS).astype(np.float32))


def ring(radius: np.ndarray, outer: float, stroke: float) -> np.ndarray:
    return np.minimum(inside(outer - radius), inside(radius - (outer - stroke)))


def inside(depth: np.ndarray) -> np.ndarray:
    """How much of a pixel lies in a shape whose edge is `depth` pixels from the pixel's middle."""
    share: np.ndarray = np.clip(depth + 0.5, 0, 1)
    return share


def over(layers: Sequence[Layer]) -> Glyph:
    """One coloured glyph from layers, the first of them lowest."""
    alpha_HW = np.zeros(layers[0].mask.shape)
    light_HW3 = np.zeros((*alpha_HW.shape, 3))  # colour times alpha
    for layer in layers:
        covers_HW = layer.mask * layer.alpha
        alpha_HW = covers_HW + alpha_HW * (1 - covers_HW)
        light_HW3 = covers_HW[..., None] * np.array(layer.colour) + light_HW3 * (1 - covers_HW[..., None])
    value_HW3 = light_HW3 / np.maximum(alpha_HW, 1e-6)[..., None]
    return Glyph(alpha_HW.astype(np.float32), value_HW3.clip(0, 1).astype(np.float32))


# where


def place(
    height: int, width: int, size: int, generator: np.random.Generator, places: str = "corners", step: int = 1
) -> Place:
    """The left upper corner of a square of `size` pixels that lies wholly in the image."""
    if min(height, width) < size:
        raise UsageError(
            "the image is too small for the mark",
            expected=f"at least {size} pixels on the smallest side",
            received=f"{width} x {height}",
        )
    right, bottom = width - size, height - size
    if places == "grid":
        return Place(
            int(generator.integers(right // step + 1)) * step, int(generator.integers(bottom // step + 1)) * step
        )
    anywhere = Place(int(generator.integers(right + 1)), int(generator.integers(bottom + 1)))
    if places == "any":
        return anywhere
    if places != "corners":
        raise UsageError(
            f"there are no places {places!r}", expected=", ".join(PLACES), hint=did_you_mean(places, PLACES)
        )
    if generator.random() >= CORNER_SHARE:
        return anywhere
    gap = margin(height, width, generator)
    x, y = min(gap, right), min(gap, bottom)
    return Place(x if generator.random() < 0.5 else right - x, y if generator.random() < 0.5 else bottom - y)


def margin(height: int, width: int, generator: np.random.Generator) -> int:
    """2-5 % of the short side, in pixels."""
    return round(generator.uniform(*MARGINS) * min(height, width))


# stamp


def stamp(image: np.ndarray, glyph: Glyph, x: int, y: int, opacity: float) -> tuple[np.ndarray, Box]:
    """A copy with the glyph's left upper corner at (x, y), and the box of what it can have changed."""
    marked = image.copy()
    box = stamp_into(marked, glyph, x, y, opacity)
    if box is None:
        raise ValueError(f"x, y: expected a mark that shows in the image {image.shape}, received {x}, {y}")
    return marked, box


def stamp_into(image: np.ndarray, glyph: Glyph, x: int, y: int, opacity: float) -> Box | None:
    """`stamp` without the copy; None where nothing of the mark can be seen, as beyond the edges."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image: expected uint8 (H, W) or (H, W, C), received {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    rows, columns = slice(max(0, -y), max(0, height - y)), slice(max(0, -x), max(0, width - x))
    strength = opacity * glyph.alpha[rows, columns].astype(np.float64)
    value = value_for(image, glyph.value[rows, columns])
    strength = strength if image.ndim == 2 else strength[..., None]
    changes = (blend(0, strength, value) != 0) | (blend(255, strength, value) != 255)
    changes = changes if image.ndim == 2 else changes.any(-1)
    if not changes.any():
        return None
    y1, y2 = bounds(changes.any(1))
    x1, x2 = bounds(changes.any(0))
    box = Box(x1 + columns.start + x, y1 + rows.start + y, x2 + columns.start + x, y2 + rows.start + y)
    under = image[box.y1 : box.y2, box.x1 : box.x2]
    under[:] = blend(under, strength[y1:y2, x1:x2], value[y1:y2, x1:x2])
    return box


def blend(pixels: np.ndarray | int, strength: np.ndarray, value: np.ndarray) -> np.ndarray:
    """x' = x + o a (255 v - x), rounded."""
    return np.floor(pixels + strength * (255.0 * value - pixels) + 0.5).astype(np.uint8)


def value_for(image: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The value with as many channels as the image has: repeated on colour, its luma on grey."""
    if value.ndim == 3 and image.ndim == 3 and image.shape[2] == 3:
        return value
    grey = value @ LUMA if value.ndim == 3 else value
    return grey if image.ndim == 2 else grey[..., None]


def bounds(flags: np.ndarray) -> tuple[int, int]:
    """[first, last + 1) of the true ones."""
    where = np.flatnonzero(flags)
    return int(where[0]), int(where[-1]) + 1
