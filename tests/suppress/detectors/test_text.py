# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from anabranch.suppress.detectors.overlap import iou
from anabranch.suppress.detectors.protocol import contains, detect_checked
from anabranch.suppress.detectors.read_text import ReadTextDetector
from anabranch.suppress.detectors.text import TextDetector


@pytest.fixture(scope="module")
def detector():
    return TextDetector()


def written(photograph, size, words="SAMPLE TEXT"):
    picture = Image.fromarray(photograph)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    place = (picture.width // 10, picture.height * 3 // 4)
    draw.text(place, words, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return np.asarray(picture), draw.textbbox(place, words, font=font, stroke_width=2)


def test_words_are_found_where_they_are(detector, photographs):
    images, truth = zip(*(written(photograph, 36) for photograph in photographs[:4]), strict=True)
    found = detect_checked(detector, images)
    assert all(contains(detections, detector.threshold) for detections in found)
    assert all(max(iou(d.box, box) for d in ds) > 0.7 for ds, box in zip(found, truth, strict=True))


def test_a_small_image_is_enlarged_first(detector):
    image, box = written(np.full((96, 128, 3), 60, np.uint8), 16, "HELLO")
    (found,) = detect_checked(detector, [image])
    assert max(iou(d.box, box) for d in found) > 0.7


def test_no_words_on_plain_ground_and_long_strips_are_bounded(detector):
    assert detect_checked(detector, [np.full((64, 64, 3), 200, np.uint8), np.zeros((1, 1, 3), np.uint8)]) == [[], []]
    prepared, scale = detector.prepare(np.zeros((30, 6000, 3), np.uint8))
    assert prepared.shape == (500, 2000, 3)
    assert scale == 1 / 3


def test_lines_below_the_least_height_are_dropped(detector, photographs):
    image, _ = written(photographs[0], 36)
    assert TextDetector(min_height=60).detect([image]) == [[]]
    assert detector.detect([image])[0]


def test_reading_names_the_words_and_cuts_false_alarms(detector, photographs):
    reader = ReadTextDetector()
    image, box = written(photographs[3], 36)
    alarms, read = detector.detect(photographs), detect_checked(reader, [*photographs, image])
    (words,) = [d for d in read[-1] if d.score > 0.5]
    assert words.label.replace(" ", "") == "SAMPLETEXT"
    assert iou(words.box, box) > 0.7
    assert sum(contains(found, 0.5) for found in alarms) >= 2
    assert sum(contains(found, reader.threshold) for found in read[:-1]) == 0
