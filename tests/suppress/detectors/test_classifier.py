# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from anabranch.errors import UsageError
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.detectors.protocol import contains, detect_checked


def save_classifier(folder, names, **config):
    """A tiny ResNet that answers `mark` where the image is bright."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, id2label=dict(enumerate(names)), **config)).eval()
    with torch.no_grad():
        features = [model.resnet(torch.full((1, 3, 32, 32), value)).pooler_output.flatten() for value in (-1.0, 1.0)]
        direction = features[1] - features[0]
        head = model.classifier[1]
        head.weight.zero_()
        head.bias.zero_()
        row = list(names).index("mark")
        head.weight[row] = 8 * direction / direction.square().sum()
        head.bias[row] = -head.weight[row] @ (features[0] + features[1]) / 2
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    return {
        "plain": save_classifier(root / "plain", ["clean", "mark"]),
        "swapped": save_classifier(root / "swapped", ["mark", "clean"]),
        "several": save_classifier(root / "several", ["a", "mark"], problem_type="multi_label_classification"),
    }


BRIGHT, DARK = np.full((20, 30, 3), 255, np.uint8), np.zeros((40, 25, 3), np.uint8)


@pytest.mark.parametrize("name", ["plain", "swapped", "several"])
def test_the_label_is_found_by_name_whatever_the_order_of_classes(folders, name):
    detector = open_detector(f"classifier:{folders[name]}:mark", geometry="none")
    bright, dark = detect_checked(detector, [BRIGHT, DARK])
    expected = 1 / (1 + np.exp(-4))  # the two images lie at +4 and -4 of the logit
    assert bright[0].score == pytest.approx(expected, abs=1e-3)
    assert dark[0].score == pytest.approx(1 - expected, abs=1e-3)
    assert bright[0].box is None
    assert (contains(bright, detector.threshold), contains(dark, detector.threshold)) == (True, False)


def test_geometry_full_is_the_whole_image_and_only_above_the_threshold(folders):
    bright, dark = open_detector(f"classifier:{folders['plain']}:mark", geometry="full").detect([BRIGHT, DARK])
    assert bright[0].box == (0, 0, 30, 20)
    assert dark[0].box is None


def test_occlusion_places_the_bright_quarter(folders):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16, 16:] = 255
    detector = open_detector(f"classifier:{folders['plain']}:mark", grid=2, threshold=0.01)
    (found,) = detect_checked(detector, [image])
    assert [d.box for d in found] == [(16, 0, 32, 16)]


@pytest.mark.parametrize(
    ("label", "says"),
    [("1", "1 is an index"), ("marks", "has no label 'marks'"), ("marks", "one of 'clean', 'mark'")],
)
def test_a_label_that_the_model_does_not_have(folders, label, says):
    with pytest.raises(UsageError) as error:
        open_detector(f"classifier:{folders['plain']}:{label}")
    assert says in str(error.value)


def test_labels_without_names_are_refused(tmp_path):
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2)).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="have no names"):
        open_detector(f"classifier:{tmp_path}:LABEL_1")


def test_other_wrong_uses(folders, tmp_path):
    with pytest.raises(UsageError, match="did you mean occlusion"):
        open_detector(f"classifier:{folders['plain']}:mark", geometry="oclusion")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not an image classifier"):
        open_detector(f"classifier:{tmp_path}:mark")
