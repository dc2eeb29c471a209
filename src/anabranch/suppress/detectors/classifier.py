# SPDX-License-Identifier: Apache-2.0
"""An image classifier as detector: the probability of one of its labels, and boxes by covering parts of the image.

Paper     : Geom-Erasing (arXiv 2310.05873) takes classifiers of watermarks and of unsafe images as detectors.
Equation  : score = softmax(logits)[label] (sigmoid for multi-label models); an image above the threshold gets the
            boxes of `geometry`: occlusion, full (the whole image) or none.
Shapes    : images (H, W, 3) uint8 of any sizes.
Differs   : geometry is ours. The label is given by name: an index is refused, because models of one concept disagree
            on the order of their classes.
Check     : swapping the classes in the model changes nothing (tests/suppress/detectors/test_classifier.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from anabranch.errors import UsageError, did_you_mean
from anabranch.suppress.detectors.local_model import fingerprint, load_local
from anabranch.suppress.detectors.occlusion import occlusion_boxes
from anabranch.suppress.detectors.protocol import Box, Detection

Geometry = Literal["occlusion", "full", "none"]
BATCH = 16


class ClassifierDetector:
    def __init__(
        self, folder: Path, label: str, threshold: float = 0.5, geometry: Geometry = "occlusion", grid: int = 8
    ):
        if geometry not in get_args(Geometry):
            raise UsageError(f"there is no geometry {geometry!r}", hint=did_you_mean(geometry, get_args(Geometry)))
        self.processor, self.model = load_local(
            folder, "AutoImageProcessor", "AutoModelForImageClassification", "an image classifier"
        )
        self.column = column_of(label, self.model.config.id2label, folder)
        self.name, self.version = f"classifier:{folder.name}:{label}", fingerprint(folder)
        self.label, self.threshold, self.geometry, self.grid = label, threshold, geometry, grid

    def detect(self, images: Sequence[np.ndarray], files: Sequence[str] | None = None) -> list[list[Detection]]:
        scores = self.probabilities(images).tolist()
        return [
            [Detection(score, box, self.label) for box in self.boxes(image, score) or [None]]
            for image, score in zip(images, scores, strict=True)
        ]

    def boxes(self, image: np.ndarray, score: float) -> list[Box]:
        """Where the concept is; only asked of images that contain it, for occlusion costs grid * grid passes."""
        if score <= self.threshold or self.geometry == "none":
            return []
        if self.geometry == "full":
            return [(0.0, 0.0, float(image.shape[1]), float(image.shape[0]))]
        return occlusion_boxes(self.probabilities, image, grid=self.grid)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """p(label) of each image, (N,)."""
        import torch

        columns = []
        for start in range(0, len(images), BATCH):
            inputs = self.processor(images=list(images[start : start + BATCH]), return_tensors="pt")
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.model.device)).logits.float()
            one_of_many = logits.shape[1] > 1 and self.model.config.problem_type != "multi_label_classification"
            columns.append((logits.softmax(-1) if one_of_many else logits.sigmoid())[:, self.column].cpu())
        return torch.cat(columns).numpy() if columns else np.zeros(0)


def column_of(label: str, names: dict[int, str], folder: Path) -> int:
    """Where the model keeps the label."""
    unnamed = all(name == f"LABEL_{column}" for column, name in names.items())
    if unnamed:
        raise UsageError(
            f"{folder}: the labels of this classifier have no names, so nothing says which one is the concept",
            expected="names in id2label of its config.json",
            received=", ".join(names.values()),
        )
    columns = [column for column, name in names.items() if name == label]
    if len(columns) == 1:
        return columns[0]
    listed = ", ".join(repr(name) for name in names.values())
    if label.isdecimal():
        raise UsageError(
            f"{label} is an index, and the order of classes differs between models",
            expected=f"the name of a label: {listed}",
        )
    problem = "has that label more than once" if columns else f"has no label {label!r}"
    raise UsageError(f"{folder}: the classifier {problem}", expected=f"one of {listed}", received=label)
