# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

from anabranch.errors import UsageError
from anabranch.models import resnet


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def model(request):
    """A network whose running statistics are no longer those of a fresh one."""
    model = resnet.build("tiny", image_size=28, channels=request.param, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.train()(torch.rand(8, request.param, 28, 28, generator=generator))
    return model.eval()


def images_for(model, size=28, count=5):
    return torch.rand(count, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_stock_classes_load_it_and_give_the_same_features(model, tmp_path):
    from transformers import AutoModel, AutoModelForImageClassification, ResNetModel

    resnet.to_plain(model).save_pretrained(tmp_path)
    images = images_for(model)
    ours = resnet.features(model, images)
    assert ours.shape == (5, 128) == (5, resnet.feature_size(model))
    stock = AutoModel.from_pretrained(tmp_path)
    assert type(stock) is ResNetModel
    assert torch.equal(stock(images).pooler_output.flatten(1), ours)
    assert torch.equal(stock(images).last_hidden_state.mean((2, 3)), ours)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.resnet(images).pooler_output.flatten(1), ours)
    assert classifier(images).logits.shape == (5, 3)
    assert stock.config.image_size == 28


def test_a_plain_copy_is_independent(model):
    plain = resnet.to_plain(model)
    with torch.no_grad():
        plain.embedder.embedder.convolution.weight.zero_()
    assert model.embedder.embedder.convolution.weight.abs().sum() > 0
    assert not plain.training
    assert plain.config is not model.config


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator():
    before = torch.random.get_rng_state()
    one, same = (resnet.build("tiny", image_size=28, channels=1, seed=3) for _ in range(2))
    other = resnet.build("tiny", image_size=56, channels=1, seed=4)
    resnet.to_plain(one)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.embedder.embedder.convolution.weight, other.embedder.embedder.convolution.weight)


def test_macs_by_hand():
    model = resnet.build("tiny", image_size=28, channels=1, seed=0).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stem = 14 * 14 * 24 * 49
    first = 7 * 7 * 2 * 24 * 24 * 9  # neither width nor size changes: no shortcut
    stages = [(4, 24, 48), (2, 48, 96), (1, 96, 128)]
    others = sum(side * side * (9 * (wide * wide + narrow * wide) + narrow * wide) for side, narrow, wide in stages)
    assert resnet.macs(model) == stem + first + others
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("preset", "parameters", "macs"), [("small", 11_176_512, 1_813_561_344), ("base", 23_508_032, 4_087_136_256)]
)
def test_small_and_base_are_resnet_18_and_50(preset, parameters, macs):
    """Their published sizes, less the classifier's 512 x 1000 + 1000 and 2048 x 1000 + 1000."""
    model = resnet.build(preset, image_size=224, channels=3, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert resnet.macs(model) == macs


def test_image_processor_reads_an_image_as_training_did(model, tmp_path):
    from transformers import AutoImageProcessor

    channels = model.config.num_channels
    resnet.to_plain(model).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(resnet.image_processor(28, channels)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (channels, 28, 28), generator=generator, dtype=torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array if channels == 3 else array[..., 0])
    got = processor(picture, return_tensors="pt", input_data_format=None)["pixel_values"]
    assert np.allclose(got.numpy()[0], resnet.normalise(pixels[None])[0].numpy(), atol=1e-6)


def test_sizes_and_presets_that_do_not_exist():
    with pytest.raises(UsageError, match="did you mean tiny"):
        resnet.check_size("tinny", 28)
    with pytest.raises(UsageError, match=r"(?s)at least 17 pixels.*received: 16"):
        resnet.build("tiny", image_size=16, channels=1, seed=0)
    resnet.check_size("base", 17)


def test_images_that_do_not_fit(model):
    channels = model.config.num_channels
    resnet.check_images(model, image_size=28, channels=channels, name="photos")
    with pytest.raises(UsageError, match=rf"(?s)photos does not fit.*images of {channels} channels.*received: 2"):
        resnet.check_images(model, image_size=28, channels=2, name="photos")
    with pytest.raises(UsageError, match=r"(?s)28 pixels a side.*received: 32"):
        resnet.check_images(model, image_size=32, channels=channels, name="photos")


def test_loading_round_trip_and_wrong_folders(model, tmp_path):
    images = images_for(model)
    resnet.to_plain(model).save_pretrained(tmp_path / "net")
    again = resnet.load(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(resnet.features(again, images), resnet.features(model, images))
    config = json.loads((tmp_path / "net/config.json").read_text())
    for changes, message in (
        ({"model_type": "vit"}, "holds a vit model"),
        ({"depths": [2, 1, 1, 1]}, "missing .*stages.0.layers.1"),
        ({"embedding_size": 32}, r"shape|cannot be loaded"),
    ):
        (tmp_path / "net/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UsageError, match=message):
            resnet.load(tmp_path / "net")
    (tmp_path / "net/config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        resnet.load(tmp_path / "net")
    with pytest.raises(UsageError, match="no such folder"):
        resnet.load(tmp_path / "nowhere")


def test_a_stock_classifier_takes_images_of_every_size(model, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    names = ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type")
    config = ResNetConfig(**{name: getattr(model.config, name) for name in names})
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    loaded = resnet.load(tmp_path)
    resnet.check_images(loaded, image_size=40, channels=model.config.num_channels, name="photos")
    assert resnet.macs(loaded, 28) == resnet.macs(model)
    with pytest.raises(UsageError, match="names no image size"):
        resnet.macs(loaded)
