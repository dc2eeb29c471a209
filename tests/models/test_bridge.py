# SPDX-License-Identifier: Apache-2.0
import inspect
from pathlib import Path

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models import bridge as module
from anabranch.models.bridge import NO_BRIDGES, bridge, open_model, read_config

FILES = sorted(path.stem for path in Path(module.__file__).parent.glob("*.py") if path.stem not in NO_BRIDGES)
OFFERS = {
    "build": ["preset", "image_size", "channels", "seed"],
    "load": ["path"],
    "check_size": ["preset", "image_size"],
    "check_images": ["model", "image_size", "channels", "name"],
    "normalise": ["pixels"],
    "features": ["model", "pixel_values"],
    "image_processor": ["image_size", "channels"],
    "macs": ["model"],
    "copy_of": ["model"],
    "to_plain": ["model"],
}


@pytest.fixture(params=FILES)
def spoken(request):
    """A bridge with its smallest model."""
    family = bridge(request.param)
    return family, family.build("tiny", image_size=28, channels=1, seed=0)


def test_every_bridge_offers_the_same(spoken):
    family, _ = spoken
    assert "tiny" in family.PRESETS
    assert isinstance(family.FEATURES, str)
    for name, arguments in OFFERS.items():
        assert list(inspect.signature(getattr(family, name)).parameters)[: len(arguments)] == arguments, name


def test_a_model_finds_its_bridge_and_survives_the_disk(spoken, tmp_path, generator):
    family, model = spoken
    assert bridge(model) is family
    assert (model.config.image_size, model.config.num_channels) == (28, 1)
    pixel_values = family.normalise(torch.randint(0, 256, (5, 1, 28, 28), generator=generator, dtype=torch.uint8))
    with torch.no_grad():
        features = family.features(model.eval(), pixel_values)
    assert features.shape == (5, features.shape[1])
    assert features.dtype == torch.float32
    model.save_pretrained(tmp_path / "model")
    again = open_model(tmp_path / "model")
    assert (again.config.image_size, again.config.num_channels) == (28, 1)
    with torch.no_grad():
        assert torch.equal(family.features(again, pixel_values), features)
        assert torch.equal(family.features(family.copy_of(model), pixel_values), features)


def test_what_is_handed_over_shares_nothing(spoken):
    family, model = spoken
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in family.to_plain(model).state_dict().values()}


def test_unknown_types_and_broken_folders(tmp_path):
    with pytest.raises(UsageError, match=r"no bridge to models of type 'vit_mea'[\s\S]*did you mean vit_mae"):
        bridge("vit_mea")
    with pytest.raises(UsageError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    for text, says in (("[1]", "a JSON object"), ("{", "expected: JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=says):
            read_config(tmp_path)
