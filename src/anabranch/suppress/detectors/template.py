# SPDX-License-Identifier: Apache-2.0
"""A known mark, such as a logo: correlate its picture with every place of an image, at a few sizes.

Paper     : Lewis 1995, "Fast normalized cross-correlation".
Equation  : r(u) = sum (I_u - mean I_u)(T - mean T) / sqrt(sum (I_u - mean I_u)^2 * sum (T - mean T)^2), sums over the
            template's opaque pixels and all channels, means over the pixels of each channel. Local maxima of r are
            candidates; of candidates that overlap by IoU > 0.3 the best is kept.
Shapes    : images (H, W, 3) uint8 of any sizes; template (h, w, 3) and mask (h, w).
Differs   : a mask, by which a mark with transparent parts ignores what shines through them; windows without contrast
            score 0; all sums are exact Fourier products (no running sums).
Check     : equals nested loops, and finds marks planted in photographs (tests/suppress/detectors/test_template.py).
Exempt    : off (a detector has no strength)
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from anabranch.data.decode import UNREADABLE, open_picture
from anabranch.errors import UsageError
from anabranch.suppress.detectors.overlap import non_maximum_suppression
from anabranch.suppress.detectors.protocol import Detection

SCALES = (0.8, 1.0, 1.25)
SMALLEST_SIDE = 7
"""A mark scaled below this many pixels looks like anything, so only its own size is tried then."""
MAX_CANDIDATES = 16
PIXELS_AT_ONCE = 2**20
SAME_MARK = 0.3
FLAT = 0.25
"""Squared deviations of 8-bit pixels that are not all alike sum to 1/2 or more."""


@dataclass(frozen=True, eq=False)
class Template:
    pixels: np.ndarray
    """(h, w, C) float64."""
    mask: np.ndarray
    """(h, w) float64, 1 where the mark is opaque."""


class TemplateDetector:
    def __init__(self, path: Path, threshold: float = 0.75, scales: Sequence[float] = SCALES):
        self.name = f"template:{path.name}"
        picture = read_template(path)
        self.version = f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        self.threshold = threshold
        self.label = path.stem
        self.templates = [scaled(picture, scale, path) for scale in usable(scales, picture)]

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in images]
        for rows in same_size(images):
            stack_NHWC = np.stack([images[i] for i in rows])
            for template in self.templates:
                for i, scores in zip(rows, correlate(stack_NHWC, template), strict=True):
                    found[i] += peaks(scores, template.mask.shape, self.label)
        return [non_maximum_suppression(candidates, SAME_MARK)[:MAX_CANDIDATES] for candidates in found]


def same_size(images: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Indices of images that can be correlated at once: of one size, and few enough for the memory."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    for shape, rows in by_shape.items():
        step = max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


def read_template(path: Path) -> Image.Image:
    if not path.is_file():
        raise UsageError(f"{path} cannot be read", expected="a PNG picture of the mark", received="no such file")
    try:
        with path.open("rb") as file, open_picture(file) as picture:
            return picture.convert("RGBA")
    except UNREADABLE as error:
        raise UsageError(f"{path} cannot be read", expected="a PNG picture", received=str(error)) from error


def usable(scales: Sequence[float], picture: Image.Image) -> list[float]:
    return [scale for scale in scales if scale == 1 or scale * min(picture.size) >= SMALLEST_SIDE]


def scaled(picture: Image.Image, scale: float, path: Path) -> Template:
    """The mark at another size, grey where it has no colour; what is less than half opaque is left out."""
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    pixels = np.asarray(picture if scale == 1 else picture.resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    colours, mask = pixels[..., :3], (pixels[..., 3] > 127).astype(np.float64)
    inside = colours[mask > 0]
    if len(inside) < 2 or np.ptp(inside, axis=0).max() == 0:
        raise UsageError(
            f"{path}: the mark has no contrast", expected="opaque pixels of different brightness", received="one colour"
        )
    return Template(colours[..., :1] if is_grey(colours) else colours, mask)


def is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[..., :1]).all())


def correlate(images_NHWC: np.ndarray, template: Template) -> np.ndarray:
    """r(u) at every place where the template fits: (N, H - h + 1, W - w + 1), empty where it fits nowhere."""
    (height, width), (h, w) = images_NHWC.shape[1:3], template.mask.shape
    if h > height or w > width:
        return np.zeros((len(images_NHWC), 0, 0))
    if template.pixels.shape[-1] == 1 and is_grey(images_NHWC):
        images_NHWC = images_NHWC[..., :1]
    channels, num_pixels = images_NHWC.shape[-1], template.mask.sum()
    colours = np.broadcast_to(template.pixels, (h, w, channels))
    deviation = (colours - (colours * template.mask[..., None]).sum((0, 1)) / num_pixels) * template.mask[..., None]
    size = [fft.next_fast_len(side, real=True) for side in (height, width)]

    def sums(spectrum_N: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        product = spectrum_N * fft.rfft2(kernel, size).conj()
        return fft.irfft2(product, size)[:, : height - h + 1, : width - w + 1]

    shared = energy = 0.0
    for channel in range(channels):
        pixels = images_NHWC[..., channel].astype(np.float64)
        pixels -= pixels.mean((1, 2), keepdims=True)  # r does not change, rounding errors shrink
        spectrum = fft.rfft2(pixels, size)
        shared = shared + sums(spectrum, deviation[..., channel])
        squares = sums(fft.rfft2(pixels**2, size), template.mask)
        energy = energy + squares - sums(spectrum, template.mask) ** 2 / num_pixels
    scores = shared / np.sqrt(np.maximum(energy, FLAT) * (deviation**2).sum())
    return np.where(energy < FLAT, 0.0, scores).clip(-1, 1)


def peaks(scores: np.ndarray, shape: tuple[int, int], label: str) -> list[Detection]:
    """The best local maxima of one score map, as boxes of the template's size."""
    if not scores.size:
        return []
    neighbourhood = [max(1, side // 2) for side in shape]
    ys, xs = np.nonzero(scores == ndimage.maximum_filter(scores, neighbourhood, mode="nearest"))
    best = np.argsort(-scores[ys, xs], kind="stable")[:MAX_CANDIDATES].tolist()
    h, w = shape
    return [
        Detection(float(scores[y, x]), (float(x), float(y), float(x + w), float(y + h)), label)
        for y, x in ((int(ys[i]), int(xs[i])) for i in best)
    ]
