# SPDX-License-Identifier: Apache-2.0
"""Detectors: which images contain a concept, and where in them. `open_detector` makes one from a line of text."""

from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.detectors.protocol import Detection, Detector, checked, contains, detect_checked

__all__ = ["Detection", "Detector", "checked", "contains", "detect_checked", "open_detector"]
