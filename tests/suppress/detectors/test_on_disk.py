# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from PIL import Image

from anabranch.errors import AnabranchError, UsageError
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.detectors.protocol import contains, detect_checked

IMAGES = [np.zeros((20, 40, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)]
FILES = ["a/one.jpg", "two.png"]
BOXES = [[(4, 2, 10, 8), (20, 10, 40, 20)], []]


def write_jsonl(root):
    rows = [{"file_name": file, "boxes": boxes} for file, boxes in zip(FILES, BOXES, strict=True)]
    (root / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"boxes:{root / 'boxes.jsonl'}"


def write_coco(root):
    document = {
        "images": [{"id": 7 + i, "file_name": file} for i, file in enumerate(FILES)],
        "categories": [{"id": 1, "name": "logo"}, {"id": 2, "name": "face"}],
        "annotations": [
            *({"image_id": 7, "category_id": 1, "bbox": [a, b, c - a, d - b]} for a, b, c, d in BOXES[0]),
            {"image_id": 8, "category_id": 2, "bbox": [0, 0, 3, 3]},
        ],
    }
    (root / "boxes.json").write_text(json.dumps(document))
    return f"boxes:{root / 'boxes.json'}"


def write_yolo(root):
    (root / "yolo" / "a").mkdir(parents=True)
    lines = [f"1 {(a + c) / 80} {(b + d) / 40} {(c - a) / 40} {(d - b) / 20}" for a, b, c, d in BOXES[0]]
    (root / "yolo" / "a" / "one.txt").write_text("\n".join(lines) + "\n")
    (root / "yolo" / "two.txt").write_text("0 0.5 0.5 0.1 0.1 0.9\n")
    (root / "yolo" / "classes.txt").write_text("face\nlogo\n")
    return f"boxes:{root / 'yolo'}"


def write_masks(root):
    (root / "masks" / "a").mkdir(parents=True)
    mask = np.zeros((20, 40), np.uint8)
    for a, b, c, d in BOXES[0]:
        mask[b:d, a:c] = 255
    Image.fromarray(mask).save(root / "masks" / "a" / "one.png")
    return f"masks:{root / 'masks'}"


@pytest.mark.parametrize("write", [write_jsonl, write_coco, write_yolo, write_masks])
def test_four_ways_to_write_the_same_boxes(tmp_path, write):
    detector = open_detector(write(tmp_path), concept="logo")
    found = detect_checked(detector, IMAGES, FILES)
    assert [[pytest.approx(box) for box in boxes] for boxes in BOXES] == [[d.box for d in ds] for ds in found]
    assert [contains(ds, detector.threshold) for ds in found] == [True, False]
    backwards = detector.detect(IMAGES[::-1], FILES[::-1])
    assert backwards == found[::-1]


def test_scores_and_images_without_a_place(tmp_path):
    rows = [{"file": "x.png", "boxes": [[0, 0, 5, 5]], "scores": [0.3]}, {"file": "y.png", "has_concept": True}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    detector = open_detector(f"boxes:{tmp_path / 'b.jsonl'}")
    x, y = detector.detect(IMAGES, ["x.png", "y.png"])
    assert (x[0].score, y[0].box) == (0.3, None)
    assert not contains(x, detector.threshold)
    assert contains(y, detector.threshold)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"file": "a.png", "boxes": []}\n{"file": "a.png"}', "line 2: 'a.png' is listed twice"),
        ('{"file": "a.png", "boxes": [[1, 2, 3]]}', "line 1: cannot be used"),
        ('{"file": "a.png", "boxes": [["x", 2, 3, 4]]}', "line 1: cannot be used"),
        ('{"file": "a.png", "boxes": [[1, 2, 3, 4]], "scores": [1, 1]}', "as many scores as boxes"),
        ('\n["a.png"]', "line 2: cannot be used"),
        ("{", "line 1: cannot be used"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, lines, says):
    (tmp_path / "b.jsonl").write_text(lines)
    with pytest.raises(AnabranchError) as error:
        open_detector(f"boxes:{tmp_path / 'b.jsonl'}")
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "text"), [
    ("b.jsonl", ""), ("b.jsonl", "\n \n"), ("b.json", '{"images": [], "annotations": []}'),
])  # fmt: skip
def test_a_file_that_lists_no_images_is_refused_when_it_is_opened(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=rf"{name} lists no images"):
        open_detector(f"boxes:{tmp_path / name}")


def test_names_that_are_missing(tmp_path):
    detector = open_detector(write_jsonl(tmp_path))
    with pytest.raises(UsageError, match="looks images up by name"):
        detector.detect(IMAGES)
    with pytest.raises(AnabranchError, match=r"does not list 'two\.jpg'") as error:
        detector.detect(IMAGES[:1], ["two.jpg"])
    assert "did you mean two.png?" in str(error.value)


def test_a_category_must_be_named_where_there_are_several(tmp_path):
    with pytest.raises(UsageError, match="several categories, none of them 'logos'") as error:
        open_detector(write_coco(tmp_path), concept="logos")
    assert "did you mean logo?" in str(error.value)
    spec = write_yolo(tmp_path)
    (tmp_path / "yolo" / "classes.txt").unlink()
    with pytest.raises(UsageError, match="several classes"):
        open_detector(spec, concept="logo")


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "b.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(UsageError, match="not a COCO file"):
        open_detector(f"boxes:{tmp_path / 'b.json'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no boxes"):
        open_detector(f"boxes:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "one.txt").write_text("0 0.5 0.5 wide 0.1")
    with pytest.raises(AnabranchError, match="line 1: cannot be used"):
        open_detector(f"boxes:{tmp_path / 'empty'}").detect(IMAGES[:1], ["one.jpg"])


def test_a_mask_of_another_size_or_no_picture(tmp_path):
    detector = open_detector(write_masks(tmp_path))
    with pytest.raises(AnabranchError, match="another size than its image"):
        detector.detect([IMAGES[1]], FILES[:1])
    (tmp_path / "masks" / "two.png").write_bytes(b"?")
    with pytest.raises(AnabranchError, match="cannot be read"):
        detector.detect([IMAGES[1]], FILES[1:])
