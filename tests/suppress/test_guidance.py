import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.prompts import encode_negatives, encode_prompts
from anabranch.suppress.guidance import Negative, ThreeBranch, check_guidance, first_noise, pictures, sample
from tests.diffusion_pipelines import CALL, FAMILIES, tiny

SEEDS = [3, 11]
PROMPTS = ["a photo of dress", "a bag"]
STEPS = 4


def stock_images(pipe, name, **given):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipe(
        prompt=PROMPTS, num_inference_steps=STEPS, generator=generators, output_type="np", **given, **CALL.get(name, {})
    ).images
    return (torch.from_numpy(images) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loop_makes_the_stock_pipelines_images_bit_for_bit(name):
    pipe = tiny(name)
    guidance = Negative(positive=encode_prompts(pipe, PROMPTS), negative=encode_prompts(pipe, ["mark"] * 2), scale=3.0)
    ours = pictures(pipe, guidance, first_noise(pipe, SEEDS), STEPS)
    stock = stock_images(pipe, name, negative_prompt=["mark"] * 2, guidance_scale=3.0)
    assert torch.equal(ours, stock)
    without = stock_images(pipe, name, negative_prompt=["", ""], guidance_scale=3.0)
    assert not torch.equal(ours, without), "the negative prompt did nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_to_avoid_is_what_the_stock_pipeline_takes_for_it(name):
    """Stable Diffusion XL puts zeros in the place of an absent negative prompt, not the encoded empty text."""
    pipe = tiny(name)
    guidance = Negative(positive=encode_prompts(pipe, PROMPTS), negative=encode_negatives(pipe, ["", ""]), scale=3.0)
    assert torch.equal(
        pictures(pipe, guidance, first_noise(pipe, SEEDS), STEPS), stock_images(pipe, name, guidance_scale=3.0)
    )


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_strength_zero_is_plain_guidance_and_scale_one_ignores_the_negative(name):
    pipe = tiny(name)
    positive, negative, empty = (encode_prompts(pipe, [text] * 2) for text in ("a dress", "mark", ""))
    noise = first_noise(pipe, SEEDS)
    plain = sample(pipe, Negative(positive=positive, negative=empty, scale=3.0), noise, STEPS)
    three = ThreeBranch(positive=positive, negative=negative, empty=empty, scale=3.0, negative_scale=0)
    assert torch.equal(sample(pipe, three, noise, STEPS), plain)
    three.negative_scale = 1.5
    assert not torch.equal(sample(pipe, three, noise, STEPS), plain)
    alone = Negative(positive=positive, negative=negative, scale=1.0)
    other = Negative(positive=positive, negative=empty, scale=1.0)
    assert torch.equal(sample(pipe, alone, noise, STEPS), sample(pipe, other, noise, STEPS))


def test_three_branches_are_the_sum_written_out():
    outputs = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    three = ThreeBranch(positive=None, negative=None, empty=None, scale=2.0, negative_scale=0.5)
    empty, towards, avoided = outputs
    expected = empty + 2 * (towards - empty) - 0.5 * (avoided - empty)
    assert torch.allclose(three.combine(outputs, 0), expected)


def test_the_negative_stands_in_its_window_alone():
    pipe = tiny("stable_diffusion_3")
    positive, negative, empty = (encode_prompts(pipe, [text] * 2) for text in ("a dress", "mark", ""))
    noise = first_noise(pipe, SEEDS)

    def made(window):
        rule = Negative(positive=positive, negative=negative, empty=empty, scale=3.0, window=window)
        return sample(pipe, rule, noise, STEPS)

    plain = sample(pipe, Negative(positive=positive, negative=empty, scale=3.0), noise, STEPS)
    whole = sample(pipe, Negative(positive=positive, negative=negative, scale=3.0), noise, STEPS)
    assert torch.equal(made((0.0, 1.0)), whole)
    assert torch.equal(made((0.0, 0.0)), plain)
    assert not torch.equal(made((0.0, 0.5)), plain)
    assert not torch.equal(made((0.0, 0.5)), whole)


def test_without_guidance_a_negative_prompt_is_refused():
    pipe = tiny("stable_diffusion")
    check_guidance(pipe, 2.0)
    with pytest.raises(UsageError, match="does nothing without guidance"):
        check_guidance(pipe, 1.0)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UsageError, match="distilled"):
        check_guidance(pipe, 7.5)
