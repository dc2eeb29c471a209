# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import segno
from PIL import Image

from anabranch.suppress.detectors.overlap import iou
from anabranch.suppress.detectors.protocol import contains, detect_checked
from anabranch.suppress.detectors.qr import QrDetector, scales_for, with_quiet_zone


def code(number, side):
    matrix = segno.make(f"https://example.org/{number}", error="m", micro=False).matrix_iter(border=2)
    pixels = np.array([[0 if dark else 255 for dark in row] for row in matrix], np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST))[..., None]


def planted(photographs, share, seed):
    generator = np.random.default_rng(seed)
    side = int(512 * share)
    for i, photograph in enumerate(photographs):
        x, y = generator.integers(0, 512 - side, 2).tolist()
        image = photograph.copy()
        image[y : y + side, x : x + side] = code(i, side)
        yield image, (x, y, x + side, y + side)


@pytest.mark.parametrize("share", [0.12, 0.2, 0.3])
def test_codes_in_photographs_are_found_with_their_quiet_zone(photographs, share):
    images, truth = zip(*planted(photographs, share, seed=1), strict=True)
    detector = QrDetector()
    found = detect_checked(detector, images)
    hits = [detections for detections in found if contains(detections, detector.threshold)]
    overlaps = [max(iou(d.box, box) for d in ds) for ds, box in zip(found, truth, strict=True) if ds]
    assert len(hits) == 10
    assert np.mean(overlaps) > 0.75  # about .65 without the margin


def test_photographs_alone_raise_no_alarm(photographs):
    assert detect_checked(QrDetector(), photographs) == [[]] * 10


def test_two_codes_are_two_boxes(photographs):
    image = photographs[0].copy()
    image[20:170, 30:180], image[300:460, 320:480] = code(1, 150), code(2, 160)
    (found,) = detect_checked(QrDetector(), [image])
    assert len(found) == 2


def test_sizes_that_are_odd(photographs):
    for height, width in ((1, 1), (8, 300), (28, 28), (513, 37)):
        assert detect_checked(QrDetector(), [np.full((height, width, 3), 90, np.uint8)]) == [[]]
    assert scales_for(1024, 4000) == (1, 2, 3)
    assert scales_for(1200, 4000) == (1, 2)
    assert scales_for(5000, 4000) == (1,)


def test_the_quiet_zone_ends_at_the_image():
    quad = np.array([[0, 10], [20, 10], [20, 30], [0, 30]], float)
    assert with_quiet_zone(quad, 22, 100) == pytest.approx((0, 7, 22, 33))
    assert with_quiet_zone(quad + 500, 22, 100) is None
