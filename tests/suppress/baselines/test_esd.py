import pytest
import torch

from anabranch.models.diffusion.family import denoiser, family
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.esd import Config, training
from anabranch.suppress.baselines.own_samples import partly_sampled
from anabranch.suppress.guidance import Negative, sample
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, check_trained

NAMES = ["stable_diffusion", "stable_diffusion_3"]
SHORT = {"num_steps": 3, "r": 2}


def rule(pipe, rows, word="mark", scale=3.0):
    prompts = {text: encode_prompts(pipe, [text]).repeat(rows) for text in (word, "")}
    return Negative(positive=prompts[word], negative=prompts[""], scale=scale)


@pytest.mark.parametrize("name", NAMES)
def test_partial_sampling_stops_every_row_at_its_own_step(name):
    pipe = tiny(name)
    noise = training(pipe, Config(**SHORT), "mark", batch_size=3).stream.batch(0)["noise"]
    noisy = partly_sampled(pipe, rule(pipe, 3), noise, torch.tensor([0, 2, 1]), 3)
    assert torch.equal(noisy.latents[0], noise[0])
    assert torch.equal(noisy.timestep, pipe.scheduler.timesteps[torch.tensor([0, 2, 1])])
    # one more step of the scheduler from its latest stop ends where the whole sampling ends
    at_end = partly_sampled(pipe, rule(pipe, 3), noise, torch.tensor([2, 2, 2]), 3)
    assert torch.equal(at_end.latents[1], noisy.latents[1])
    outputs = [
        family(pipe).predict(pipe, at_end.latents, at_end.timestep, prompt) for prompt in rule(pipe, 3).branches(0)
    ]
    last = pipe.scheduler.timesteps[2]
    guided = rule(pipe, 3).combine(outputs, 2)
    ended = pipe.scheduler.step(guided, last, at_end.latents, return_dict=False)[0]
    assert torch.allclose(ended, sample(pipe, rule(pipe, 3), noise, 3), atol=1e-4)


@pytest.mark.parametrize("trained", ["lora", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_of_the_first_model_and_the_samples_of_the_trained_one(name, trained):
    pipe, untouched = tiny(name), tiny(name)
    objective, stream = training(pipe, Config(trained=trained, eta=1.5, **SHORT), "mark", batch_size=2)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05)
    batch = stream.batch(0) | {"stop": torch.tensor([2, 1])}
    loss = objective(batch)["loss"]
    noisy = partly_sampled(pipe, rule(pipe, 2), batch["noise"], batch["stop"], 3)
    total = 0.0
    for row in range(2):
        x, timestep = noisy.latents[row : row + 1], noisy.timestep[row : row + 1]
        word, empty = (encode_prompts(pipe, [text]) for text in ("mark", ""))
        first_word, first_empty = (family(pipe).predict(untouched, x, timestep, c) for c in (word, empty))
        target = first_empty - 1.5 * (first_word - first_empty)
        now = family(pipe).predict(pipe, x, timestep, word)
        assert not torch.allclose(now, first_word, atol=1e-4)
        total = total + ((now - target.detach()) ** 2).mean() / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    ours, by_hand = (torch.autograd.grad(value, list(objective.parameters())) for value in (loss, total))
    assert any(gradient.abs().sum() > 0 for gradient in ours)
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(ours, by_hand, strict=True))


CHANGED = {
    ("stable_diffusion", "x", "lora"): ["*.attn2.*.lora_*"],
    ("stable_diffusion", "u", "lora"): ["*.attn1.*.lora_*"],
    ("stable_diffusion", "x", "weights"): ["*.attn2.to_q.*", "*.attn2.to_k.*", "*.attn2.to_v.*", "*.attn2.to_out.*"],
    ("stable_diffusion_3", "x", "lora"): ["*.add_k_proj.lora_*", "*.add_v_proj.lora_*"],
    ("stable_diffusion_3", "u", "lora"): ["*.attn.to_*.lora_*", "*.add_q_proj.lora_*"],
    ("stable_diffusion_3", "x", "weights"): ["*.add_k_proj.*", "*.add_v_proj.*"],
}


@pytest.mark.parametrize(("name", "variant", "trained"), sorted(CHANGED))
def test_the_loss_falls_and_only_the_variants_weights_change(name, variant, trained):
    pipe = tiny(name)
    run = training(pipe, Config(variant=variant, trained=trained, **SHORT), "mark", batch_size=BATCH)
    check_trained(pipe, run, CHANGED[name, variant, trained], steps=4)


@pytest.mark.parametrize("name", NAMES)
def test_x_and_u_share_the_weights_between_them(name):
    names = [
        set(
            training(tiny(name), Config(variant=variant, trained="weights"), "mark", batch_size=1).objective._parameters
        )
        for variant in ("x", "u")
    ]
    everything = {key.replace(".", "/") for key, _ in denoiser(tiny(name)).named_parameters()}
    assert names[0] | names[1] == everything
    assert not names[0] & names[1]


@pytest.mark.parametrize("trained", ["lora", "weights"])
def test_bfloat16_changes_neither_the_two_models_nor_the_gradients_way(trained):
    pipe = tiny("stable_diffusion_3")
    objective, stream = training(pipe, Config(trained=trained, variant="u", **SHORT), "mark", batch_size=2)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05)
    batch = stream.batch(0) | {"stop": torch.tensor([1, 2])}
    full = objective(batch)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch)["loss"]
        loss.backward()
    assert loss.item() == pytest.approx(full, rel=0.1)  # stale copies of weights: a thousand times off
    assert any(p.grad.abs().sum() > 0 for p in objective.parameters())


def test_wrong_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="expected x or u, lora or weights, received 'all', 'lora'"):
        Config(variant="all")
    with pytest.raises(ValueError, match="eta, num_steps: expected above 0, received 0, 50"):
        Config(eta=0)
