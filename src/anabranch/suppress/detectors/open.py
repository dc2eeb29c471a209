# SPDX-License-Identifier: Apache-2.0
"""From a line of text to a detector: `qr`, `template:logo.png`, `classifier:FOLDER:LABEL`, ...

Other packages bring more of them by an entry point in the group anabranch.detectors: see anabranch.plugins.
"""

from pathlib import Path
from typing import Any

from anabranch.errors import UsageError
from anabranch.plugins import DETECTORS, opened, plugins, unknown
from anabranch.suppress.detectors.protocol import Detector

SPECS = {
    "qr": "qr",
    "text": "text",
    "read-text": "read-text",
    "template": "template:FILE.png",
    "classifier": "classifier:FOLDER:LABEL",
    "zero-shot": "zero-shot:FOLDER",
    "boxes": "boxes:FILE",
    "masks": "masks:FOLDER",
}
NEEDED = ("name", "version", "threshold", "detect")


def open_detector(
    spec: str, *, concept: str = "", threshold: float | None = None, geometry: str = "occlusion", grid: int = 8
) -> Detector:
    """The detector that `spec` names (see SPECS); `threshold` None keeps the detector's own.

    `concept` is the prompt of a zero-shot detector and the category of boxes on disk; `geometry` (occlusion, full or
    none) and `grid` tell a classifier how to place boxes.
    """
    kind, _, rest = spec.partition(":")
    if kind not in SPECS and kind in plugins(DETECTORS):
        chosen = None if threshold is None else _checked(threshold)
        made: Detector = opened(DETECTORS, kind, rest, NEEDED, concept=concept, threshold=chosen)
        return made
    if kind not in SPECS:
        raise unknown("detector", kind, SPECS.values(), DETECTORS)
    if bool(rest) != (":" in SPECS[kind]):
        raise UsageError(f"the detector {spec!r} cannot be used", expected=SPECS[kind])
    own: dict[str, Any] = {} if threshold is None else {"threshold": _checked(threshold)}
    if kind == "qr":
        from anabranch.suppress.detectors.qr import QrDetector

        return QrDetector(**own)
    if kind == "text":
        from anabranch.suppress.detectors.text import TextDetector

        return TextDetector(**own)
    if kind == "read-text":
        from anabranch.suppress.detectors.read_text import ReadTextDetector

        return ReadTextDetector(**own)
    if kind == "template":
        from anabranch.suppress.detectors.template import TemplateDetector

        return TemplateDetector(Path(rest).expanduser(), **own)
    if kind == "zero-shot":
        from anabranch.suppress.detectors.zero_shot import ZeroShotDetector

        return ZeroShotDetector(Path(rest).expanduser(), concept, **own)
    if kind == "classifier":
        return _classifier(rest, geometry=geometry, grid=grid, **own)
    from anabranch.suppress.detectors.on_disk import BoxesOnDisk, MasksOnDisk

    path = Path(rest).expanduser()
    return MasksOnDisk(path, **own) if kind == "masks" else BoxesOnDisk(path, concept, **own)


def _classifier(rest: str, **options: Any) -> Detector:
    from anabranch.suppress.detectors.classifier import ClassifierDetector

    folder, _, label = rest.rpartition(":")
    if not folder or not label:
        raise UsageError(f"the detector 'classifier:{rest}' cannot be used", expected=SPECS["classifier"])
    return ClassifierDetector(Path(folder).expanduser(), label, **options)


def _checked(threshold: float) -> float:
    if not 0 <= threshold < 1:
        raise UsageError("the threshold cannot be used", expected="from 0 to below 1", received=threshold)
    return threshold
