# SPDX-License-Identifier: Apache-2.0
"""Text that can be read: the lines that `text` finds, scored by how surely a second network reads them.

Paper     : Shi et al. 2017, convolutional recurrent reading (arXiv 1507.05717); the weights are PP-OCRv4's.
Equation  : score = mean probability of the characters read from a line; 0 for fewer than two characters.
Shapes    : images (H, W, 3) uint8 of any sizes; the label is what was read.
Differs   : only lines that `text` finds with a score above 0.5 are read. Photographs give far fewer false alarms than
            with `text` alone; letters that a model garbled are text to the eye and often not to the reader, so prefer
            `text` for counting those.
Check     : reads drawn words, and cuts the false alarms on photographs (tests/suppress/detectors/test_text.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from anabranch.suppress.detectors.protocol import Detection, needed
from anabranch.suppress.detectors.text import INSTALL, TextDetector

LEAST_CHARACTERS = 2


class ReadTextDetector:
    name = "read-text"

    def __init__(self, threshold: float = 0.5):
        self.finder = TextDetector()
        self.reader = needed("rapidocr_onnxruntime", INSTALL).RapidOCR().text_rec
        self.version, self.threshold = self.finder.version, threshold

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        found = self.finder.detect(images)
        return [self._read(image, lines) for image, lines in zip(images, found, strict=True)]

    def _read(self, image: np.ndarray, lines: list[Detection]) -> list[Detection]:
        sure = [line for line in lines if line.score > self.finder.threshold]
        if not sure:
            return []
        words, _ = self.reader([crop(image, line) for line in sure])
        return [
            replace(line, score=float(score) if len(text.strip()) >= LEAST_CHARACTERS else 0.0, label=text.strip())
            for line, (text, score) in zip(sure, words, strict=True)
        ]


def crop(image: np.ndarray, line: Detection) -> np.ndarray:
    """The line as BGR, as the reader was trained."""
    x1, y1, x2, y2 = line.box
    part = image[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2)), ::-1]
    return np.ascontiguousarray(part)
