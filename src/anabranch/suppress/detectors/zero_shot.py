# SPDX-License-Identifier: Apache-2.0
"""Anything that has a name: ask an open-vocabulary detector (OWLv2, Grounding DINO) for the concept.

Paper     : Minderer et al. 2023, OWLv2 (arXiv 2306.09683); Liu et al. 2023, Grounding DINO (arXiv 2303.05499).
Equation  : score_q = sigmoid(max over the prompt of the logits of query q), box_q = the query's box; the best 50 that
            overlap each other by IoU <= 0.5 are the candidates.
Shapes    : images (H, W, 3) uint8 of any sizes; boxes are scaled to (H, W), cut at the image.
Differs   : nothing is downloaded: the model is a folder with safetensors; Grounding DINO gets the prompt in lower case
            with a full stop, as it was trained.
Check     : boxes equal the model's own output, scaled by hand (tests/suppress/detectors/test_zero_shot.py).
Exempt    : everything (needs an open-vocabulary detector, of which its own test makes a small one)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import UsageError
from anabranch.suppress.detectors.local_model import fingerprint, load_local
from anabranch.suppress.detectors.overlap import non_maximum_suppression
from anabranch.suppress.detectors.protocol import Detection

LEAST_SCORE = 0.02
MAX_CANDIDATES = 50
SAME_OBJECT = 0.5
LISTS_OF_PROMPTS = ("owlvit", "owlv2")
SENTENCES = ("grounding-dino", "mm-grounding-dino")


class ZeroShotDetector:
    def __init__(self, folder: Path, concept: str, threshold: float = 0.2):
        if not concept.strip():
            raise UsageError(
                "a zero-shot detector needs words to look for", hint="name the concept: --concept watermark"
            )
        self.processor, self.model = load_local(
            folder, "AutoProcessor", "AutoModelForZeroShotObjectDetection", "a zero-shot object detector"
        )
        self.kind = self.model.config.model_type
        if self.kind not in LISTS_OF_PROMPTS + SENTENCES:
            known = ", ".join(LISTS_OF_PROMPTS + SENTENCES)
            raise UsageError(f"{folder}: this kind of detector is not supported", expected=known, received=self.kind)
        self.name, self.version = f"zero-shot:{folder.name}", fingerprint(folder)
        self.concept, self.threshold = concept.strip(), threshold

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        return [self._detect(image) for image in images]  # one at a time: images of any sizes, bounded memory

    def _detect(self, image: np.ndarray) -> list[Detection]:
        scores, boxes = self.find(image)
        height, width = image.shape[:2]
        found = []
        for score, box in sorted(zip(scores, boxes, strict=True), key=lambda pair: -pair[0]):
            x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)
            if x1 < x2 and y1 < y2:  # these models also place boxes beside the image
                found.append(Detection(score, (x1, y1, x2, y2), self.concept))
        return non_maximum_suppression(found[:MAX_CANDIDATES], SAME_OBJECT)

    def find(self, image: np.ndarray) -> tuple[list[float], list[list[float]]]:
        """Scores and boxes in pixels, as the model has them."""
        import torch

        inputs = self.processor(text=prompt(self.kind, self.concept), images=[image], return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs.to(self.model.device))
        options: dict[str, Any] = {"threshold": LEAST_SCORE, "target_sizes": [image.shape[:2]]}
        if self.kind in SENTENCES:
            options["input_ids"] = inputs["input_ids"]
        answer = self.processor.post_process_grounded_object_detection(outputs, **options)[0]
        return answer["scores"].tolist(), answer["boxes"].tolist()


def prompt(kind: str, concept: str) -> list[list[str]] | list[str]:
    return [f"{concept.lower().rstrip('.')}."] if kind in SENTENCES else [[concept]]
