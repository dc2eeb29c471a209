import pytest
import torch

from anabranch.models.diffusion.family import denoiser, family
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks.relearning import NAME, Config, relearn, side_lora
from anabranch.suppress.geom_erasing.adapter import hashes
from anabranch.suppress.guidance import Negative, first_noise, sample
from anabranch.suppress.lora import add_lora
from tests.diffusion_pipelines import FAMILIES, tiny
from tests.suppress.baselines.trained import latents_of

CAPTIONS = ["a dress", "a bag", "a coat", "a photo of dress", "a photo of bag", "coat"]
CONFIG = Config(at=(0, 2, 10), r=2, learning_rate=1e-2, batch_size=6)


def drawn(pipe):
    positive, negative = encode_prompts(pipe, ["a dress", "a bag"]), encode_prompts(pipe, ["", ""])
    return sample(pipe, Negative(positive=positive, negative=negative, scale=2.0), first_noise(pipe, [3, 11]), 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_looked_at_on_the_way_and_back_afterwards(name):
    pipe = tiny(name)
    parameters = add_lora(pipe, 2, 0)  # the adapter under attack
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    before, plain = hashes(pipe), drawn(pipe)
    curve = relearn(pipe, latents_of(pipe), CAPTIONS, CONFIG, lambda step: drawn(pipe))
    assert [step for step, _ in curve] == [0, 2, 10]
    assert torch.equal(curve[0][1], plain)
    assert not torch.allclose(curve[1][1], plain)
    assert not torch.allclose(curve[2][1], curve[1][1])
    assert hashes(pipe) == before
    assert torch.equal(drawn(pipe), plain)


def test_the_loss_falls_on_the_pictures_that_it_learns():
    pipe = tiny("stable_diffusion")
    latents, losses = latents_of(pipe), []
    conditioning = encode_prompts(pipe, CAPTIONS)

    def look(step):
        z = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        output = family(pipe).predict(pipe, z, torch.tensor(10), conditioning)
        losses.append((output - (z - latents) / 0.1).square().mean().item())

    relearn(pipe, latents, CAPTIONS, Config(at=(0, 30), r=4, learning_rate=1e-2, batch_size=6), look)
    assert losses[1] < losses[0]


def test_a_layer_computes_what_the_equation_says():
    pipe = tiny("stable_diffusion")
    name, layer = next((n, p) for n, p in denoiser(pipe).named_modules() if n.endswith(".attn2.to_k"))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    with side_lora(pipe, 2, 0) as parameters:
        A, B = (parameters[f"{NAME}.{name.replace('.', '/')}/{factor}"] for factor in "AB")
        assert torch.equal(layer(x), before)
        with torch.no_grad():
            B.add_(1.0)
        assert torch.allclose(layer(x), before + torch.einsum("or,ri,bti->bto", B, A, x), atol=1e-5)
    assert torch.equal(layer(x), before)


def test_wrong_steps_and_captions_are_refused():
    with pytest.raises(ValueError, match="at: expected rising steps"):
        Config(at=(5, 2))
    pipe = tiny("stable_diffusion")
    with pytest.raises(ValueError, match="captions: expected one for each of 6 pictures, received 1"):
        relearn(pipe, latents_of(pipe), ["a dress"], CONFIG, lambda step: step)
