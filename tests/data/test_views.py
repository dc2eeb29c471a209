# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from anabranch.data.views import Views, apply_views, draw_views, make_views, shaded, turned

PLAIN = {"scale": (1.0, 1.0), "degrees": 0.0, "brightness": 0.0, "contrast": 0.0, "noise_std": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 13)])
def test_settings_that_change_nothing_give_the_image_back_exactly(channels, size):
    images = noise(6, channels, size, size)
    views = make_views(images, generator(), Views(**PLAIN))
    assert views.dtype == torch.uint8
    assert torch.equal(views, images.expand(2, *images.shape))
    mirrored = make_views(images, generator(), Views(**PLAIN, flip=1.0))
    assert torch.equal(mirrored, images.flip(-1).expand(2, *images.shape))


def test_drawn_values_stay_in_range_and_fill_it():
    draw = draw_views(20_000, generator(), Views(num_small=1, flip=0.25))
    assert draw.crops.shape == (3, 20_000, 2, 3)
    for factor in (draw.brightness, draw.contrast):
        assert 0.6 <= factor.min() < 0.61
        assert 1.39 < factor.max() <= 1.4
        # uniform: mean 1, deviation of the mean .8 / sqrt(12 * 60000) = .00094
        assert factor.mean().item() == pytest.approx(1, abs=0.005)
    area = draw.crops[..., :2].det().abs()
    for view, (least, most) in enumerate([(0.4, 1.0), (0.4, 1.0), (0.1, 0.4)]):
        assert least - 1e-5 <= area[view].min() < least + 0.01
        assert most - 0.01 < area[view].max() <= most + 1e-5
    width = draw.crops[..., 0].norm(dim=-1)
    height = draw.crops[..., 1].norm(dim=-1)
    turn = -(draw.crops[..., 0, 1] / height).asin().rad2deg()
    assert 9.9 < turn.max() <= 10.001
    assert -10.001 <= turn.min() < -9.9
    assert (width / height).min() >= 3 / 4 - 1e-4
    assert (width / height).max() <= 4 / 3 + 1e-4
    mirrored = (draw.crops[..., :2].det() < 0).double().mean().item()
    assert mirrored == pytest.approx(0.25, abs=0.01)  # deviation .0018
    assert (draw_views(1000, generator(), Views()).crops[..., :2].det() > 0).all()  # no flip unless asked for


def test_a_quarter_turn_is_the_image_turned():
    images = noise(3, 1, 16, 16)
    crops = turned(torch.eye(3)[:2].expand(3, 2, 3), torch.full((3,), 90.0))
    draw = draw_views(3, generator(), Views(**PLAIN))._replace(crops=torch.stack([crops, crops]))
    assert torch.equal(apply_views(images, draw)[0], images.rot90(1, (2, 3)))


def test_brightness_and_contrast_by_hand():
    pixels = torch.tensor([[[[10.0, 30.0]], [[50.0, 70.0]]]])
    assert shaded(pixels, torch.tensor([2.0]), torch.tensor([1.0])).flatten().tolist() == [20, 60, 100, 140]
    assert shaded(pixels, torch.tensor([1.0]), torch.tensor([0.5])).flatten().tolist() == [25, 35, 45, 55]
    assert torch.equal(shaded(pixels, torch.tensor([1.0]), torch.tensor([0.0])), torch.full_like(pixels, 40))


def test_noise_has_the_deviation_that_was_asked_for():
    grey = torch.full((64, 1, 28, 28), 128, dtype=torch.uint8)
    views = make_views(grey, generator(), Views(**PLAIN | {"noise_std": 0.05}))
    # rounding adds a variance of 1/12
    assert views.float().std().item() == pytest.approx(math.sqrt((255 * 0.05) ** 2 + 1 / 12), rel=0.01)
    assert not torch.equal(views[0], views[1])


def test_the_generator_decides_and_nothing_else():
    images, config = noise(8, 3, 20, 20), Views(num_small=2)
    before = torch.random.get_rng_state()
    one, same, other = (make_views(images, generator(seed), config) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.shape == (4, 8, 3, 20, 20)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({view.numpy().tobytes() for view in one}) == 4
    assert torch.equal(one[:2], make_views(images, generator(1), Views()))  # small crops come on top


def test_a_view_depends_on_its_own_image_only():
    images, config = noise(8, 1, 20, 20), Views(num_small=1)
    others = noise(8, 1, 20, 20, seed=5)
    others[3] = images[3]
    ours, theirs = (make_views(pixels, generator(), config) for pixels in (images, others))
    assert torch.equal(ours[:, 3], theirs[:, 3])
    assert not torch.equal(ours[:, 4], theirs[:, 4])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (0.5, 0.4)}, r"scale: expected 0 < least <= most <= 1, received \(0.5, 0.4\)"),
        ({"small_scale": (0.0, 0.4)}, "small_scale: expected 0 < least"),
        ({"aspect": (1.1, 1.3)}, "aspect: expected 0 < least <= 1"),
        ({"brightness": 1.5}, "brightness: expected 0..1, received 1.5"),
        ({"degrees": -1.0}, "degrees: expected 0..180, received -1.0"),
        ({"num_small": -1}, "num_small: expected at least 0, received -1"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Views(**wrong)


def test_wrong_images():
    with pytest.raises(ValueError, match="expected uint8"):
        make_views(torch.rand(2, 1, 8, 8), generator(), Views())
    with pytest.raises(ValueError, match="expected 3 as drawn, received 2"):
        apply_views(noise(2, 1, 8, 8), draw_views(3, generator(), Views()))
