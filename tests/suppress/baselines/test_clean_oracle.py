import pytest
import torch

from anabranch.suppress.baselines import fine_tuning
from anabranch.suppress.baselines.clean_oracle import check_twins, training
from anabranch.suppress.baselines.fine_tuning import Config
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, CAPTIONS, check_trained, latents_of

CONTAINS = [True, False, False, True, False, True]


def contaminated(twins):
    latents = twins.clone()
    latents[torch.tensor(CONTAINS), :, :2, :2] = 1.0
    return latents


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_it_is_plain_fine_tuning_but_for_the_twins(name):
    twins = latents_of(tiny(name))
    latents, config = contaminated(twins), Config(r=2)
    plain = fine_tuning.training(tiny(name), config, latents, CAPTIONS, batch_size=BATCH)
    pipe = tiny(name)
    oracle = training(pipe, config, latents, twins, CAPTIONS, CONTAINS, batch_size=BATCH)
    for step in range(2):
        ours, theirs = oracle.stream.batch(step), plain.stream.batch(step)
        assert torch.equal(ours.pop("latents"), twins[oracle.stream.indices.at(step)])
        assert torch.equal(theirs.pop("latents"), latents[plain.stream.indices.at(step)])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
    check_trained(pipe, oracle, ["*.lora_*"])


def test_pictures_that_are_no_twins_are_refused():
    twins = latents_of(tiny("stable_diffusion"))
    latents = contaminated(twins)
    check_twins(latents, twins + 1e-5, CONTAINS)
    with pytest.raises(ValueError, match="received another picture for image 1"):
        check_twins(latents, twins[[0, 2, 1, 3, 4, 5]], CONTAINS)
    with pytest.raises(ValueError, match="received the contaminated picture for image 0"):
        check_twins(latents, latents, CONTAINS)
    with pytest.raises(ValueError, match="expected one length, received 6, 6, 2"):
        check_twins(latents, twins, [True, False])
