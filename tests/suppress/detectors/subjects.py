# SPDX-License-Identifier: Apache-2.0
"""How detectors are exercised: images in, boxes out, whatever the other images are."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import segno
import torch
from PIL import Image

from anabranch.suppress.detectors import classifier, occlusion, on_disk, qr, read_text, template, text
from anabranch.testing import Reordering, Subject, along
from tests.suppress.detectors.test_classifier import save_classifier
from tests.suppress.detectors.test_template import GLYPH

COUNT = 3


@cache
def folder() -> Path:
    return Path(mkdtemp())


def noisy(g, size=64, count=COUNT):
    pixels = torch.randint(90, 160, (count, size, size, 3), generator=g)
    return [image.to(torch.uint8).numpy() for image in pixels]


def detecting(make, images, **more) -> Subject:
    """`make(threshold)` is the detector; files are named after the images."""

    make = cache(make)  # networks are read from a file

    def call(images, files, threshold):
        return [sorted(map(repr, found)) for found in make(threshold).detect(images, files)]

    def reordered(given, order):
        return {**given, "images": [given["images"][i] for i in order], "files": [given["files"][i] for i in order]}

    return Subject(
        inputs=lambda g: {"images": images(g), "files": ["a.png", "b.png", "c.png"], "threshold": 0.5},
        call=call,
        samples=Reordering(size=COUNT, inputs=reordered, output=lambda result, order: [result[i] for i in order]),
        **more,
    )


def subject_qr() -> Subject:
    def images(g):
        made = noisy(g, 160)
        modules = np.array([list(row) for row in segno.make("anabranch").matrix_iter(scale=3, border=2)], np.uint8)
        code = np.repeat(255 - 255 * modules[..., None], 3, 2)
        made[1][20 : 20 + len(code), 30 : 30 + len(code)] = code
        return made

    return detecting(qr.QrDetector, images)


def subject_template() -> Subject:
    file = folder() / "glyph.png"
    Image.fromarray(GLYPH).save(file)

    def images(g):
        made = noisy(g)
        made[2][10:17, 20:27] = GLYPH[..., None]
        return made

    return detecting(lambda threshold: template.TemplateDetector(file, threshold, scales=(1.0,)), images)


def lettered(g):
    made = noisy(g, 48)
    made[0][:] = 255
    made[0][16:30, 6:42:6] = 0
    return made


def subject_text() -> Subject:
    return detecting(text.TextDetector, lettered)


def subject_read_text() -> Subject:
    return detecting(read_text.ReadTextDetector, lettered)


def subject_on_disk() -> Subject:
    file = folder() / "boxes.jsonl"
    boxes = {"a.png": [[1, 2, 8, 9]], "b.png": [], "c.png": [[3, 3, 6, 7], [10, 10, 20, 30]]}
    file.write_text("".join(json.dumps({"file_name": name, "boxes": of}) + "\n" for name, of in boxes.items()))
    return detecting(lambda threshold: on_disk.BoxesOnDisk(file, "", threshold), noisy)


@cache
def classifier_folder() -> Path:
    return Path(save_classifier(folder() / "classifier", ["clean", "mark"]))


def subject_classifier() -> Subject:
    def make(threshold):
        return classifier.ClassifierDetector(classifier_folder(), "mark", threshold, geometry="occlusion", grid=2)

    return detecting(make, lambda g: noisy(g, 32))


def subject_occlusion() -> Subject:
    def call(image, least_fall):
        def white(images):
            return np.array([(image > 0.5).mean() for image in images])

        return occlusion.occlusion_boxes(white, image, grid=4, least_fall=least_fall)

    def inputs(g):
        image = np.zeros((16, 16, 3), np.float32)
        image[4:8, 8:12] = 1
        return {"image": image, "least_fall": 0.3}

    return Subject(inputs=inputs, call=call, samples=along(1, {}))
