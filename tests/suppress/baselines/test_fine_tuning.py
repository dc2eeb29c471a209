import pytest
import torch

from anabranch.models.diffusion.family import family
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.fine_tuning import Config, prepare, training
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, CAPTIONS, check_trained, latents_of

FAMILIES = ["stable_diffusion", "stable_diffusion_3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_plain_mean_of_what_the_scheduler_asks_for(name):
    pipe = tiny(name)
    objective, stream = training(pipe, Config(prompt_dropout=0.0), latents_of(pipe), CAPTIONS, batch_size=BATCH)
    batch = stream.batch(0)
    assert "weights" not in batch
    captions = [CAPTIONS[row] for row in stream.indices.at(0)]
    noised = noising(pipe.scheduler).noise(batch["latents"], batch["noise"], batch["u"])
    total = 0.0
    for row in range(BATCH):
        prompt = encode_prompts(pipe, captions[row : row + 1])
        output = family(pipe).predict(pipe, noised.latents[row : row + 1], noised.timestep[row : row + 1], prompt)
        total += ((output - noised.target[row : row + 1]) ** 2).mean().item() / BATCH
    assert objective(batch)["loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_alone_changes_or_the_denoiser_alone(name):
    pipe = tiny(name)
    check_trained(pipe, training(pipe, Config(r=2), latents_of(pipe), CAPTIONS, batch_size=BATCH), ["*.lora_*"])
    pipe = tiny(name)
    config = Config(trained="denoiser")
    check_trained(pipe, training(pipe, config, latents_of(pipe), CAPTIONS, batch_size=BATCH), ["*"], steps=3)


def test_a_share_of_the_rows_loses_its_prompt():
    pipe = tiny("stable_diffusion_3")
    stream = training(pipe, Config(prompt_dropout=0.25), latents_of(pipe), CAPTIONS, batch_size=200).stream
    nothing = stream.data.ids[0][2, 0]
    share = (stream.batch(0)["ids_0"] == nothing).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.1)  # 200 rows: three standard deviations


def test_wrong_use_says_what_was_expected():
    with pytest.raises(ValueError, match="trained: expected lora or denoiser, received 'unet'"):
        Config(trained="unet")
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(ValueError, match=r"captions: expected one an image \(6\), received 1"):
        prepare(pipe, Config(), latents_of(pipe), ["a dress"])


def test_what_was_trained_before_is_frozen_first():
    pipe = tiny("stable_diffusion_3")
    pipe.text_encoder.requires_grad_(True)
    _, parameters = prepare(pipe, Config(r=2), latents_of(pipe), CAPTIONS)
    trained = {id(p) for part in (pipe.text_encoder, pipe.transformer) for p in part.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters.values()}
    assert all(isinstance(p, torch.nn.Parameter) for p in parameters.values())
