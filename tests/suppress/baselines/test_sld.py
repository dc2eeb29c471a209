import warnings

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.sld import PRESETS, Safe, guidance
from anabranch.suppress.guidance import Negative, first_noise, pictures, sample
from tests.diffusion_pipelines import tiny

SEEDS, STEPS = [3, 11], 4
CAPTIONS = ["a photo of dress", "a bag"]


def slow_guidance(outputs, step, nu, scale, preset):
    """Element by element from the paper."""
    base, towards, unsafe = (output.flatten().tolist() for output in outputs)
    guided, momentum = [], []
    for e0, ey, eS, n in zip(base, towards, unsafe, nu, strict=True):
        mu = min(1.0, preset["strength"] * abs(ey - eS)) if ey - eS < preset["threshold"] else 0.0
        gamma = mu * (eS - e0) + preset["momentum_scale"] * n
        momentum.append(preset["momentum_beta"] * n + (1 - preset["momentum_beta"]) * gamma)
        guided.append(e0 + scale * (ey - e0 - (gamma if step >= preset["warmup"] else 0.0)))
    return guided, momentum


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_step_is_the_papers(preset):
    settings = PRESETS[preset] | {"warmup": min(1, PRESETS[preset]["warmup"])}
    rule = Safe(positive=None, unsafe=None, empty=None, scale=2.0, **settings)
    generator = torch.Generator().manual_seed(0)
    nu = [0.0] * 24
    for step in range(3):
        outputs = [0.02 * torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(3)]
        expected, nu = slow_guidance(outputs, step, nu, 2.0, settings)
        assert rule.combine(outputs, step).flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert rule.momentum.flatten().tolist() == pytest.approx(nu, abs=1e-12)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_strength_zero_is_plain_guidance_and_momentum_begins_anew(name):
    pipe = tiny(name)
    noise = first_noise(pipe, SEEDS)
    empty = encode_prompts(pipe, ["", ""])
    plain = sample(pipe, Negative(positive=encode_prompts(pipe, CAPTIONS), negative=empty, scale=3.0), noise, STEPS)
    rule = guidance(pipe, CAPTIONS, "mark", 3.0, preset="max", num_steps=STEPS)
    safe = sample(pipe, rule, noise, STEPS)
    assert not torch.equal(safe, plain)
    assert torch.equal(sample(pipe, rule, noise, STEPS), safe)
    rule.strength = 0.0
    assert torch.equal(sample(pipe, rule, noise, STEPS), plain)


def test_it_makes_the_stock_pipelines_images():
    pipe = tiny("stable_diffusion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated there
        from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

        parts = {key: part for key, part in pipe.components.items() if key != "image_encoder"}
        stock = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
        stock.set_progress_bar_config(disable=True)
        stock.safety_concept = "mark"
        settings = PRESETS["medium"] | {"warmup": 1}
        names = {"warmup": "sld_warmup_steps", "strength": "sld_guidance_scale", "threshold": "sld_threshold"}
        names |= {"momentum_scale": "sld_momentum_scale", "momentum_beta": "sld_mom_beta"}
        images = stock(
            CAPTIONS, num_inference_steps=STEPS, guidance_scale=3.0, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            **{names[key]: value for key, value in settings.items()},
        ).images  # fmt: skip
    rule = guidance(pipe, CAPTIONS, "mark", 3.0, preset="medium", num_steps=STEPS)
    assert rule.warmup == 1  # 10 of 50
    ours = pictures(pipe, rule, first_noise(pipe, SEEDS), STEPS)
    assert torch.equal(ours, (torch.from_numpy(images) * 255).round().to(torch.uint8).permute(0, 3, 1, 2))


def test_wrong_use_says_what_there_is():
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(UsageError, match="did you mean medium"):
        guidance(pipe, CAPTIONS, "mark", 3.0, preset="medum")
    with pytest.raises(UsageError, match="does nothing without guidance"):
        guidance(pipe, CAPTIONS, "mark", 1.0)
