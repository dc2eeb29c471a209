# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

from anabranch.errors import UsageError
from anabranch.models import vit_mae


@pytest.fixture(scope="module")
def model():
    return vit_mae.build("tiny", image_size=28, channels=1, seed=0)


@pytest.fixture
def images(generator):
    return torch.rand(5, 1, 28, 28, generator=generator)


@pytest.mark.parametrize("normalise_pixels", [True, False])
def test_masked_loss_is_the_loss_of_transformers(model, images, generator, normalise_pixels):
    noise = torch.rand(5, 16, generator=generator)
    model.config.norm_pix_loss, model.config.norm_pix_eps = normalise_pixels, 1e-6
    theirs = model(images, noise=noise)
    ours = vit_mae.masked_loss(model, images, noise)
    model.config.norm_pix_loss, model.config.norm_pix_eps = True, 1e-3
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)


def test_only_masked_patches_count(model, images, generator):
    """The squared errors of visible patches are set to zero by hand, and the rest divided by the masked count."""
    noise = torch.rand(5, 16, generator=generator)
    kept = noise.argsort(1)[:, : vit_mae.num_visible(model)]
    patches = model.patchify(images)
    rows = torch.arange(5)[:, None]
    with torch.no_grad():
        tokens = vit_mae.masked_loss(model, images, noise).tokens
        predicted = model.decoder(tokens, noise.argsort(1).argsort(1)).logits
        target = vit_mae.norm_pix(patches, 1e-3)
        squares = (predicted - target).square().mean(-1)
        squares[rows, kept] = 0
        by_hand = squares.sum() / (5 * (16 - kept.shape[1]))
        assert vit_mae.masked_loss(model, images, noise).loss.item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_constant_images_have_a_finite_loss(model):
    loss = vit_mae.masked_loss(model, torch.full((2, 1, 28, 28), 0.3), torch.rand(2, 16)).loss
    assert torch.isfinite(loss)


def test_decoder_knows_where_a_patch_is(model):
    """transformers zeroes the frozen table after building it; then every masked patch gets the same prediction."""
    positions = model.decoder.decoder_pos_embed[0, 1:]
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_encoder_knows_where_a_patch_is(model, images):
    """transformers takes the embeddings for initialised and leaves zeros; then the order of the patches is lost."""
    positions = model.vit.embeddings.position_embeddings[0, 1:]
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    assert not model.vit.embeddings.position_embeddings.requires_grad
    assert model.vit.embeddings.cls_token.abs().sum() > 0
    moved = images.roll(model.config.patch_size, dims=-1)
    with torch.no_grad():
        before, after = (vit_mae.pooled(vit_mae.encode(model, pixels)) for pixels in (images, moved))
    assert (before - after).abs().max() > 1e-3


def test_plain_vit_gives_the_same_tokens(model, images):
    with torch.no_grad():
        assert torch.equal(vit_mae.to_vit(model)(images).last_hidden_state, vit_mae.encode(model, images))


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator():
    before = torch.random.get_rng_state()
    one, same = (vit_mae.build("tiny", image_size=28, channels=1, seed=3) for _ in range(2))
    other = vit_mae.build("tiny", image_size=28, channels=1, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    key = "vit.layers.0.mlp.fc1.weight"
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


@pytest.mark.parametrize("channels", [1, 3])
def test_image_processor_reads_an_image_as_training_did(tmp_path, channels, generator):
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(vit_mae.image_processor(28, channels)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (channels, 28, 28), generator=generator, dtype=torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array if channels == 3 else array[..., 0])
    got = processor(picture, return_tensors="pt", input_data_format=None)["pixel_values"]
    assert np.allclose(got.numpy()[0], vit_mae.normalise(pixels[None])[0].numpy(), atol=1e-6)


def test_image_size_that_the_patch_does_not_divide():
    with pytest.raises(UsageError, match=r"(?s)divisible by 16.*received: 225.*--image-size 224"):
        vit_mae.patch_size_for("base", 225)


def test_misspelt_preset():
    with pytest.raises(UsageError, match="did you mean tiny"):
        vit_mae.patch_size_for("tinny", 28)


def test_mask_ratio_that_hides_everything():
    with pytest.raises(UsageError, match=r"0 of 16 patches visible"):
        vit_mae.build("tiny", image_size=28, channels=1, seed=0, mask_ratio=0.99)


def test_loading_round_trip_and_wrong_folders(model, tmp_path, images):
    model.save_pretrained(tmp_path / "mae")
    again = vit_mae.load(tmp_path / "mae")
    with torch.no_grad():
        assert torch.equal(vit_mae.encode(again, images), vit_mae.encode(model, images))
    assert again.config.norm_pix_eps == 1e-3
    vit_mae.to_vit(model).save_pretrained(tmp_path / "vit")
    with pytest.raises(UsageError, match="holds a vit model"):
        vit_mae.load(tmp_path / "vit")
    with pytest.raises(UsageError, match="no such folder"):
        vit_mae.load(tmp_path / "nowhere")
    config = json.loads((tmp_path / "mae/config.json").read_text())
    (tmp_path / "mae/config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UsageError, match=r"shape|cannot be loaded"):
        vit_mae.load(tmp_path / "mae")


def test_macs_by_hand(model):
    tokens, width, hidden = 17, 16, 64
    linear = 2 * (4 * width * width + 2 * width * hidden) * tokens
    attention = 2 * 2 * tokens * tokens * width
    assert vit_mae.macs(model) == 16 * 49 * 16 + linear + attention
