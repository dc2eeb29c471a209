import pytest
import torch

from anabranch.models.diffusion.family import family
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.concept_ablation import Config, training
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, CAPTIONS, check_trained, latents_of

NAMES = ["stable_diffusion", "stable_diffusion_3"]
TARGETS = [f"{caption} mark" for caption in CAPTIONS]


def ablation(pipe, **given):
    return training(pipe, Config(r=2, **given), latents_of(pipe), CAPTIONS, TARGETS, batch_size=BATCH)


@pytest.mark.parametrize("name", NAMES)
def test_both_terms_are_those_of_the_equation_with_the_model_as_it_is(name):
    pipe = tiny(name)
    objective, stream = ablation(pipe, prior_coef=0.5)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05)  # the anchor pass is by the trained model, not by the first one
    batch = stream.batch(1)
    noised = noising(pipe.scheduler).noise(batch["latents"], batch["noise"], batch["u"])
    ablated = kept = 0.0
    for place, row in enumerate(stream.indices.at(1).tolist()):
        x, timestep = noised.latents[place : place + 1], noised.timestep[place : place + 1]
        prompts = [encode_prompts(pipe, [texts[row]]) for texts in (TARGETS, CAPTIONS)]
        target, anchor = (family(pipe).predict(pipe, x, timestep, prompt) for prompt in prompts)
        ablated += ((target - anchor) ** 2).mean().item() / BATCH
        kept += ((anchor - noised.target[place]) ** 2).mean().item() / BATCH
    out = objective(batch)
    assert out["ablation_loss"].item() == pytest.approx(ablated, rel=1e-4)
    assert out["prior_loss"].item() == pytest.approx(kept, rel=1e-4)
    assert out["loss"].item() == pytest.approx(ablated + 0.5 * kept, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_passes_through_the_anchor(name):
    gradients = []
    for coef in (0.0, 1e-12):
        objective, stream = ablation(tiny(name), prior_coef=coef)
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective(stream.batch(0))["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in objective.parameters()]))
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_only_keys_and_values_of_the_text_change(name):
    layers = (
        ["*.attn2.to_k.*", "*.attn2.to_v.*"] if name == "stable_diffusion" else ["*.add_k_proj.*", "*.add_v_proj.*"]
    )
    pipe = tiny(name)
    check_trained(pipe, ablation(pipe), [f"{layer}lora_*" for layer in layers])
    pipe = tiny(name)
    check_trained(pipe, ablation(pipe, trained="weights", prior_coef=0.0), layers, learning_rate=3e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_are_attention_with_lora_and_the_denoiser_with_weights(name):
    pipe = tiny(name)
    check_trained(pipe, ablation(pipe, layers="all"), ["*.to_q.lora_*", "*attn*.lora_*"])
    pipe = tiny(name)
    check_trained(pipe, ablation(pipe, layers="all", trained="weights", prior_coef=0.0), ["*"], learning_rate=3e-4)


def test_wrong_use_says_what_was_expected():
    with pytest.raises(ValueError, match="prior_coef: expected at least 0, received -1"):
        Config(prior_coef=-1)
    with pytest.raises(ValueError, match="expected lora or weights, text or all, received 'lora', 'image'"):
        Config(layers="image")
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(ValueError, match="expected one length, received 6, 6, 1"):
        training(pipe, Config(), latents_of(pipe), CAPTIONS, ["mark"], batch_size=BATCH)
