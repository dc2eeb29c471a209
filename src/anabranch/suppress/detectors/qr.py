# SPDX-License-Identifier: Apache-2.0
"""QR codes: find the pattern with OpenCV's two finders, without decoding it.

Paper     : none; the symbol and its quiet zone are ISO/IEC 18004, the finders are OpenCV's QRCodeDetectorAruco (nested
            squares) and QRCodeDetector (dark and light runs of 1:1:3:1:1).
Equation  : quads = squares(image) and runs(enlarge(image, s)) / s for s in 1, 2, 3 while s * min(H, W) <= 3 * 1024;
            box = bounding box of the quad, each side grown by 15 % of its length, cut at the image; of boxes that
            overlap by IoU > 0.5 the first is kept.
Shapes    : images (H, W, 3) uint8 of any sizes; a score is 1, for the finders give no confidence.
Differs   : both finders, because runs miss most codes below 30 % of a 512-pixel image whose modules are no whole
            pixels, and squares those that are torn; growing, because the quad leaves out the quiet zone; detection
            only, because generated codes rarely decode.
Check     : codes of 12 to 30 % of the image are found, photographs are not (tests/suppress/detectors/test_qr.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.suppress.detectors.overlap import non_maximum_suppression
from anabranch.suppress.detectors.protocol import Box, Detection, needed

SCALES = (1, 2, 3)
LARGEST_SHORT_SIDE = 3 * 1024
QUIET_ZONE = 0.15
SAME_CODE = 0.5


class QrDetector:
    name = "qr"

    def __init__(self, threshold: float = 0.5):
        self.cv2 = needed("cv2")
        self.squares, self.runs = self.cv2.QRCodeDetectorAruco(), self.cv2.QRCodeDetector()
        self.version = f"opencv {self.cv2.__version__}"
        self.threshold = threshold

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        return [self._detect(np.ascontiguousarray(image)) for image in images]

    def _detect(self, image: np.ndarray) -> list[Detection]:
        height, width = image.shape[:2]
        self.cv2.setRNGSeed(0)  # the finders draw: one image's answer must not depend on those before it
        grey = self.cv2.cvtColor(image, self.cv2.COLOR_RGB2GRAY)
        quads = [*self._find(self.squares, grey, 1)]
        for scale in scales_for(width, height):
            quads += [*self._find(self.runs, grey, scale)]
        boxes = [with_quiet_zone(quad, width, height) for quad in quads]
        found = [Detection(1.0, box, "QR code") for box in boxes if box is not None]
        return non_maximum_suppression(found, SAME_CODE)

    def _find(self, finder: Any, grey: np.ndarray, scale: int) -> np.ndarray:
        """(N, 4, 2) corners in pixels of the image before it was enlarged."""
        larger = grey
        if scale > 1:
            larger = self.cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self.cv2.INTER_CUBIC)
        _, quads = finder.detectMulti(larger)
        return np.empty((0, 4, 2)) if quads is None else quads.astype(np.float64) / scale


def scales_for(width: int, height: int) -> tuple[int, ...]:
    """Those that leave the shorter side at no more than 3 * 1024 pixels, and always 1."""
    return tuple(scale for scale in SCALES if scale == 1 or scale * min(width, height) <= LARGEST_SHORT_SIDE)


def with_quiet_zone(quad: np.ndarray, width: int, height: int) -> Box | None:
    """Bounding box grown by 15 % of its sides, cut at the image; None where nothing of it lies inside."""
    low, high = quad.min(0), quad.max(0)
    margin = QUIET_ZONE * (high - low)
    x1, y1 = np.maximum(low - margin, 0).tolist()
    x2, y2 = np.minimum(high + margin, (width, height)).tolist()
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
