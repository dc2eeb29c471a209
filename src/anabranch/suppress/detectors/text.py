# SPDX-License-Identifier: Apache-2.0
"""Text laid over an image: find its lines with the detection network inside the rapidocr package, without reading.

Paper     : Liao et al. 2020, differentiable binarization (arXiv 1911.08947); the weights are PP-OCRv4's.
Equation  : regions = {p > 0.3}, score = mean of p inside a region, box = bounding box of the region grown again.
Shapes    : images (H, W, 3) uint8 of any sizes; the network sees a shorter side of at least 736 pixels.
Differs   : candidates are kept from a score of 0.3 on, so that the threshold can be chosen later; lines lower than
            `min_height` pixels are dropped; long strips are padded and large images shrunk to bound the work.
Check     : drawn words are found at IoU > 0.7, small images too (tests/suppress/detectors/test_text.py).
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from anabranch.suppress.detectors.protocol import Detection, needed

INSTALL = "pip install 'anabranch[erase]', then pip install --no-deps rapidocr-onnxruntime"
LEAST_SCORE = 0.3
LARGEST_SIDE, LONGEST_RATIO = 2000, 4


class TextDetector:
    name = "text"

    def __init__(self, threshold: float = 0.5, min_height: float = 5.0):
        self.cv2 = needed("cv2")
        package = needed("rapidocr_onnxruntime", INSTALL)
        self.network = package.RapidOCR().text_det
        self.network.postprocess_op.box_thresh = LEAST_SCORE
        self.version = f"rapidocr-onnxruntime {version('rapidocr-onnxruntime')}"
        self.threshold, self.min_height = threshold, min_height

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> list[Detection]:
        height, width = image.shape[:2]
        prepared, scale = self.prepare(image)
        quads, scores = self.find(np.ascontiguousarray(prepared[..., ::-1]))
        found = []
        for quad, score in zip(quads, scores, strict=True):
            corners = quad.reshape(-1, 2) / scale
            x1, y1 = np.maximum(corners.min(0), 0).tolist()
            x2, y2 = np.minimum(corners.max(0), (width, height)).tolist()
            if x2 > x1 and y2 - y1 >= self.min_height:
                found.append(Detection(float(score), (x1, y1, x2, y2), "text"))
        return found

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """The image shrunk to the largest side and padded to the longest ratio, and by how much it was scaled."""
        scale = min(1.0, LARGEST_SIDE / max(image.shape[:2]))
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
            image = self.cv2.resize(image, (width, height), interpolation=self.cv2.INTER_AREA)
        least = -(-max(image.shape[:2]) // LONGEST_RATIO)
        missing = [(0, max(0, least - side)) for side in image.shape[:2]]
        return np.pad(image, [*missing, (0, 0)], mode="edge"), scale

    def find(self, image_bgr: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """Quads in pixels and their scores; the package's own call would drop the scores."""
        prepare = self.network.get_preprocess(max(image_bgr.shape[:2]))
        probabilities = self.network.infer(prepare(image_bgr))[0]
        return self.network.postprocess_op(probabilities, image_bgr.shape[:2])
