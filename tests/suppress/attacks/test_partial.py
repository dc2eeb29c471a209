import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks.partial import sample_from
from anabranch.suppress.guidance import Negative, first_noise, sample
from tests.diffusion_pipelines import tiny

SEEDS = [3, 11]


def rule(pipe):
    positive, negative = encode_prompts(pipe, ["a dress", "a bag"]), encode_prompts(pipe, ["mark", "ring"])
    return Negative(positive=positive, negative=negative, scale=3.0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_bit_for_bit_the_stock_image_to_image_pipeline(strength, scheduler):
    pipe = tiny("stable_diffusion")
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        ["a dress", "a bag"], image=latents, strength=strength, num_inference_steps=5, guidance_scale=3.0,
        negative_prompt=["mark", "ring"], output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    ours = sample_from(pipe, rule(pipe), latents, first_noise(pipe, SEEDS), 5, strength, SEEDS)
    assert torch.equal(ours, expected)


def test_flow_matching_too_and_all_of_the_way_is_plain_sampling():
    pipe = tiny("stable_diffusion_3")
    latents = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noise = first_noise(pipe, SEEDS)
    assert torch.equal(sample_from(pipe, rule(pipe), latents, noise, 4, 1.0), sample(pipe, rule(pipe), noise, 4))
    near, far = (sample_from(pipe, rule(pipe), latents, noise, 10, strength) for strength in (0.2, 0.9))
    assert (near - latents).abs().mean() < (far - latents).abs().mean()
    stock = StableDiffusion3Img2ImgPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        ["a dress", "a bag"], image=latents, strength=0.5, num_inference_steps=4, guidance_scale=3.0,
        negative_prompt=["mark", "ring"], output_type="latent", max_sequence_length=1,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], height=28, width=28,
    ).images  # fmt: skip
    assert torch.equal(sample_from(pipe, rule(pipe), latents, noise, 4, 0.5), expected)


def test_a_strength_of_no_step_is_refused():
    pipe = tiny("stable_diffusion")
    latents = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="strength: expected in"):
        sample_from(pipe, rule(pipe), latents, latents, 5, 0.1)
