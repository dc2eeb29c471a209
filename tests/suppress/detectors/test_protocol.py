# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from anabranch.errors import AnabranchError, UsageError
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.detectors.protocol import Detection, checked, contains, detect_checked

IMAGE = np.zeros((30, 40, 3), np.uint8)


class Canned:
    name, version, threshold = "canned", "1", 0.5

    def __init__(self, *answers):
        self.answers = answers

    def detect(self, images, files=None):
        return [list(answer) for answer in self.answers]


def test_contains_is_strictly_above_the_threshold():
    found = [Detection(0.5, None), Detection(0.2, (0, 0, 1, 1))]
    assert not contains(found, 0.5)
    assert contains(found, 0.49)
    assert not contains([], 0)


def test_a_box_at_most_one_pixel_outside_is_clipped_and_no_box_is_fine():
    (clipped, none) = checked([Detection(1, (-1, 0.5, 41, 31)), Detection(0.1, None)], 40, 30, detector="d")
    assert clipped.box == (0, 0.5, 40, 30)
    assert none.box is None


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((10, 10, 5, 20), "this looks like xywh"),
        ((10, 10, 10, 20), "empty or reversed"),
        ((0, 0, 42, 10), "outside the image"),
        ((40.2, 0, 40.9, 10), "outside the image"),
        ((0, -1.5, 10, 10), "inside 0, 0, 40, 30"),
        ((0, math.nan, 10, 10), "not four finite numbers"),
        ((0, 0, math.inf, 10), "not four finite numbers"),
        ((0, 0, 10), "not four finite numbers"),
    ],
)
def test_a_wrong_box_names_the_detector(box, says):
    with pytest.raises(AnabranchError, match="detector canned") as error:
        detect_checked(Canned([Detection(1.0, box)]), [IMAGE])
    assert says in str(error.value)


def test_a_score_that_is_no_number_and_a_lost_image():
    with pytest.raises(AnabranchError, match="score that is no number"):
        detect_checked(Canned([Detection(math.nan, None)]), [IMAGE])
    with pytest.raises(AnabranchError, match="lost count"):
        detect_checked(Canned([]), [IMAGE, IMAGE])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("qrr", "did you mean qr?"),
        ("zeroshot:x", "did you mean zero-shot?"),
        ("qr:5", "expected: qr"),
        ("template", "template:FILE.png"),
        ("template:nowhere.png", "no such file"),
        ("classifier:folder", "classifier:FOLDER:LABEL"),
        ("classifier:nowhere:mark", "models are never downloaded"),
        ("zero-shot:nowhere", "name the concept"),
        ("boxes:nowhere.jsonl", "cannot be read"),
        ("masks:nowhere", "no masks"),
    ],
)
def test_a_wrong_line_of_text(spec, says):
    with pytest.raises(UsageError) as error:
        open_detector(spec)
    assert says in str(error.value)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_a_threshold_that_lets_all_or_nothing_through(threshold):
    with pytest.raises(UsageError, match="threshold cannot be used"):
        open_detector("qr", threshold=threshold)
    assert open_detector("qr", threshold=0.25).threshold == 0.25


@pytest.mark.parametrize(
    ("spec", "module", "says"),
    [
        ("qr", "cv2", "pip install 'anabranch[erase]'"),
        ("text", "cv2", "pip install 'anabranch[erase]'"),
        ("text", "rapidocr_onnxruntime", "pip install --no-deps rapidocr-onnxruntime"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(without, spec, module, says):
    without(module)
    with pytest.raises(UsageError, match=f"needs {module}") as error:
        open_detector(spec)
    assert says in str(error.value)
