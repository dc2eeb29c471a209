import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.conditioning import concatenate
from anabranch.models.diffusion.family import family, image_side, open_pipeline, save_pipeline
from anabranch.models.diffusion.latents import to_latents, to_pixels
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_prompts
from tests.diffusion_pipelines import CALL, FAMILIES, tiny

PROMPTS = ["a photo of dress", "", "bag bag bag bag bag bag bag bag bag bag bag bag bag bag bag bag bag bag bag"]


def stock_encode(pipe, name, prompts):
    if name == "stable_diffusion":
        return pipe.encode_prompt(prompts, "cpu", 1, False)[0], None
    if name == "stable_diffusion_xl":
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return embeds, pooled
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, **CALL["stable_diffusion_3"]
    )
    return embeds, pooled


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(name):
    pipe = tiny(name)
    ours = encode_prompts(pipe, PROMPTS)
    embeds, pooled = stock_encode(pipe, name, PROMPTS)
    assert torch.allclose(ours.embeds, embeds, atol=1e-6)
    assert pooled is None or torch.allclose(ours.pooled, pooled, atol=1e-6)
    together = concatenate([ours.take(torch.tensor([i])) for i in range(len(PROMPTS))])
    assert torch.equal(together.embeds, ours.embeds)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_is_opened_with_frozen_weights_and_computes_the_same(name, tmp_path):
    pipe = tiny(name)
    save_pipeline(pipe, tmp_path / "model")
    opened = open_pipeline(tmp_path / "model")
    module, side = family(opened), family(opened).latent_size(opened)
    x = torch.randn(2, 1 if name == "stable_diffusion_3" else 4, side, side)
    timestep = torch.tensor([7, 300])
    outputs = [module.predict(p, x, timestep, encode_prompts(p, PROMPTS[:2])) for p in (pipe, opened)]
    assert torch.equal(*outputs)
    parts = [part for part in opened.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)


def test_small_pictures_pass_through_the_identity_autoencoder_unchanged():
    pipe = tiny("stable_diffusion_3")
    pixels = torch.arange(256).repeat(4)[: 28 * 28].view(1, 1, 28, 28).to(torch.uint8)
    latents = to_latents(pipe, pixels)
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(to_pixels(pipe, latents), pixels)
    beyond = to_pixels(pipe, latents * 3)
    assert beyond.min() == 0
    assert beyond.max() == 255


def test_grey_pictures_are_repeated_for_a_model_of_colours():
    pipe = tiny("stable_diffusion")
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(to_latents(pipe, grey), to_latents(pipe, grey.expand(-1, 3, -1, -1)))
    assert image_side(pipe) == 16


def test_noise_and_target_follow_the_scheduler():
    pipe = tiny("stable_diffusion")
    process = noising(pipe.scheduler)
    z, eps, u = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.5, 0.999])
    noised = process.noise(z, eps, u)
    assert noised.timestep.tolist() == [0, 500, 999]
    assert torch.allclose(noised.latents, pipe.scheduler.add_noise(z, eps, noised.timestep), atol=1e-6)
    assert torch.equal(noised.target, eps)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    noised = noising(pipe.scheduler).noise(z, eps, u)
    assert torch.allclose(noised.target, pipe.scheduler.get_velocity(z, eps, noised.timestep), atol=1e-6)


def test_flow_matching_walks_a_straight_line_and_its_sampler_walks_it_back():
    pipe = tiny("stable_diffusion_3")
    process = noising(pipe.scheduler)
    z, eps = torch.randn(2, 1, 28, 28), torch.randn(2, 1, 28, 28)
    pipe.scheduler.set_timesteps(5)
    x = eps
    for timestep in pipe.scheduler.timesteps:
        at = process.noise(z, eps, timestep.expand(2) / 1000)
        assert torch.allclose(at.latents, x, atol=1e-5)
        x = pipe.scheduler.step(at.target, timestep, x, return_dict=False)[0]
    assert torch.allclose(x, z, atol=1e-5)


def test_a_folder_that_is_no_pipeline_says_so(tmp_path):
    with pytest.raises(UsageError, match="not a diffusers pipeline"):
        open_pipeline(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UsageError, match="this kind of pipeline is not supported"):
        open_pipeline(tmp_path)
