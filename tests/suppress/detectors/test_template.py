# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anabranch.data.images import open_images
from anabranch.errors import UsageError
from anabranch.suppress.detectors.overlap import iou
from anabranch.suppress.detectors.protocol import contains, detect_checked
from anabranch.suppress.detectors.template import Template, TemplateDetector, correlate

GLYPH = np.array(
    [
        [255, 255, 255, 255, 255, 255, 255],
        [255, 0, 0, 0, 0, 0, 255],
        [255, 0, 255, 0, 255, 0, 255],
        [255, 0, 0, 255, 0, 0, 255],
        [255, 0, 255, 0, 255, 0, 255],
        [255, 0, 0, 0, 0, 0, 255],
        [255, 255, 255, 255, 255, 255, 255],
    ],
    np.uint8,
)


@pytest.fixture(scope="module")
def garments():
    """(300, 28, 28, 3) photographs of clothes."""
    images = open_images("patchwork:garments", channels=3)
    return images.store.read(torch.arange(0, len(images), len(images) // 300)[:300]).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def glyph(tmp_path_factory):
    path = tmp_path_factory.mktemp("glyph") / "glyph.png"
    Image.fromarray(GLYPH).save(path)
    return path


def slow_correlation(image, template):
    """Straight loops over the definition; slow on purpose."""
    (h, w), channels = template.mask.shape, image.shape[2]
    out = np.zeros((image.shape[0] - h + 1, image.shape[1] - w + 1))
    places = [(i, j) for i in range(h) for j in range(w) if template.mask[i, j]]
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            shared = energy = own = 0.0
            for c in range(channels):
                window = [float(image[y + i, x + j, c]) for i, j in places]
                mark = [float(template.pixels[i, j, min(c, template.pixels.shape[2] - 1)]) for i, j in places]
                a, b = np.array(window) - np.mean(window), np.array(mark) - np.mean(mark)
                shared, energy, own = shared + a @ b, energy + a @ a, own + b @ b
            out[y, x] = shared / np.sqrt(energy * own) if energy > 1e-9 else 0
    return out


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    mark=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    channels=st.sampled_from([1, 3]),
    levels=st.sampled_from([2, 256]),
    seed=st.integers(0, 2**31 - 1),
)
def test_fast_correlation_equals_the_loops(size, mark, channels, levels, seed):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, levels, (*size, 3), np.uint8)
    image[:, : size[1] // 2] = generator.integers(0, levels)  # flat places score 0
    mask = (generator.random(mark) < 0.8).astype(float)
    mask[0, 0] = mask[-1, -1] = 1
    pixels = generator.integers(0, 256, (*mark, channels)).astype(float)
    pixels[0, 0], pixels[-1, -1] = 0, 200
    template = Template(pixels, mask)
    assert correlate(image[None], template)[0] == pytest.approx(slow_correlation(image, template), abs=1e-6)


def test_large_bright_images_lose_no_precision():
    image = np.random.default_rng(0).integers(200, 256, (1, 400, 400, 1)).repeat(3, -1).astype(np.uint8)
    image[0, 100:200, 100:300] = 255
    template = Template(GLYPH[..., None].astype(float), np.ones((7, 7)))
    scores = correlate(image, template)[0]
    part = slow_correlation(image[0, 90:120, 90:120], template)
    assert scores[90:114, 90:114] == pytest.approx(part, abs=1e-6)


def test_planted_glyphs_are_found_and_clothes_are_not(garments, glyph):
    detector = TemplateDetector(glyph)
    generator = np.random.default_rng(0)
    images, truth = garments.copy(), []
    for image in images:
        x, y = generator.integers(0, 22, 2).tolist()
        image[y : y + 7, x : x + 7] = GLYPH[..., None]
        truth.append((x, y, x + 7, y + 7))
    found = detect_checked(detector, images)
    assert all(contains(detections, detector.threshold) for detections in found)
    assert all(iou(ds[0].box, box) == 1 for ds, box in zip(found, truth, strict=True))
    clean = detect_checked(detector, garments)
    assert sum(contains(detections, detector.threshold) for detections in clean) == 0
    assert all(detections for detections in clean)  # every candidate comes back, however low


def test_faint_inverted_and_larger_glyphs(garments, glyph):
    faint, inverted = garments[0].astype(float) * 0.2, garments[0].copy()
    faint[3:10, 4:11] = 30 + 0.2 * GLYPH[..., None]
    inverted[3:10, 4:11] = 255 - GLYPH[..., None]
    detector = TemplateDetector(glyph)
    found = detector.detect([faint.astype(np.uint8), inverted])
    assert found[0][0].box == (4, 3, 11, 10)
    assert found[0][0].score > 0.99
    assert not contains(found[1], detector.threshold)
    larger = np.asarray(Image.fromarray(GLYPH).resize((9, 9), Image.Resampling.BICUBIC))
    image = garments[1].copy()
    image[10:19, 10:19] = larger[..., None]
    assert detector.detect([image])[0][0].box == (10, 10, 19, 19)


def test_two_marks_are_two_boxes_and_sizes_may_be_mixed(garments, glyph):
    image = np.full((40, 60, 3), 90, np.uint8)
    image[2:9, 3:10] = image[30:37, 50:57] = GLYPH[..., None]
    found = TemplateDetector(glyph).detect([garments[0], image, np.zeros((5, 5, 3), np.uint8), garments[1]])
    assert {d.box for d in found[1] if d.score > 0.75} == {(3, 2, 10, 9), (50, 30, 57, 37)}
    assert found[2] == []
    assert found[3] == TemplateDetector(glyph).detect([garments[1]])[0]


def test_transparent_parts_of_a_coloured_mark_may_show_anything(tmp_path, photographs):
    generator = np.random.default_rng(0)
    mark = np.zeros((24, 30, 4), np.uint8)
    mark[4:20, 5:25, :3] = generator.integers(0, 256, (16, 20, 3))
    mark[4:20, 5:25, 3] = 255
    mark[8:14, 10:18, 3] = 0
    Image.fromarray(mark).save(tmp_path / "logo.png")
    image = photographs[2].copy()
    image[100:124, 200:230][mark[..., 3] > 0] = mark[..., :3][mark[..., 3] > 0]
    detector = TemplateDetector(tmp_path / "logo.png")
    (found, clean) = detect_checked(detector, [image, photographs[2]])
    assert found[0].box == (200, 100, 230, 124)
    assert found[0].score > 0.99
    assert found[0].label == "logo"
    assert not contains(clean, detector.threshold)


@pytest.mark.parametrize(("fill", "says"), [(0, "no contrast"), (None, "expected: a PNG picture")])
def test_a_template_that_cannot_be_used(tmp_path, fill, says):
    path = tmp_path / "mark.png"
    if fill is None:
        path.write_bytes(b"no picture")
    else:
        Image.fromarray(np.full((9, 9), fill, np.uint8)).save(path)
    with pytest.raises(UsageError) as error:
        TemplateDetector(path)
    assert says in str(error.value)
