# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.data.augment import apply_crops, draw_crops, random_resized_crop


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_whole_image_is_given_back_exactly(dtype):
    images = noise(3, 2, 9, 12).to(dtype)
    identity = torch.eye(3)[:2].expand(3, 2, 3)
    assert torch.allclose(apply_crops(images, identity).double(), images.double(), atol=1e-3)
    assert apply_crops(images, identity).dtype == dtype


def test_a_mirrored_crop_is_the_image_read_backwards():
    images = noise(2, 1, 8, 8)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    assert torch.equal(apply_crops(images, mirror), images.flip(-1))


def test_a_quarter_crop_shows_that_quarter():
    images = torch.zeros(1, 1, 16, 16)
    images[..., :8, 8:] = 100  # top right
    quarter = torch.tensor([[[0.5, 0, 0.5], [0, 0.5, -0.5]]])
    assert apply_crops(images, quarter)[..., 1:-1, 1:-1].min() == 100


def test_drawn_crops_hold_area_aspect_and_place():
    crops = draw_crops(20_000, generator())
    width, height = crops[:, 0, 0].abs(), crops[:, 1, 1]
    area, aspect = width * height, width / height
    assert area.min() >= 0.2 - 1e-5
    assert area.max() <= 1 + 1e-5
    assert aspect.min() >= 3 / 4 - 1e-4
    assert aspect.max() <= 4 / 3 + 1e-4
    for side, centre in ((width, crops[:, 0, 2]), (height, crops[:, 1, 2])):
        assert (centre.abs() + side).max() <= 1 + 1e-5  # never outside the image
    # uniform area: mean .6, deviation of the mean .8 / sqrt(12 * 20000) = .0016; flips: deviation .0035
    assert area.mean().item() == pytest.approx(0.6, abs=0.008)
    assert (crops[:, 0, 0] < 0).double().mean().item() == pytest.approx(0.5, abs=0.018)
    assert aspect.log().mean().item() == pytest.approx(0, abs=0.01)


def test_values_stay_in_range_and_the_generator_decides():
    images = noise(16, 3, 12, 12)
    out = random_resized_crop(images, generator(1))
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert torch.equal(out, random_resized_crop(images, generator(1)))
    assert not torch.equal(out, random_resized_crop(images, generator(2)))
    grey = torch.full((8, 1, 12, 12), 77, dtype=torch.uint8)
    assert (random_resized_crop(grey, generator()) == 77).all()
    before = torch.random.get_rng_state()
    random_resized_crop(images, generator())
    assert torch.equal(before, torch.random.get_rng_state())
