import pytest
import torch

from anabranch.errors import UsageError
from anabranch.suppress.baselines.data_filtering import training
from anabranch.suppress.baselines.fine_tuning import Config
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, CAPTIONS, check_trained, latents_of

CONTAINS = [True, False, False, True, False, True]


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_only_clean_images_are_drawn_with_their_own_captions(name):
    pipe = tiny(name)
    latents, config = latents_of(pipe), Config(r=2, prompt_dropout=0.0)
    run = training(pipe, config, latents, CAPTIONS, CONTAINS, batch_size=BATCH, minimum=3)
    clean = [row for row, found in enumerate(CONTAINS) if not found]
    ids = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    drawn = set()
    for step in range(3):
        batch = run.stream.batch(step)
        for image, prompt in zip(batch["latents"], batch["ids_0"], strict=True):
            row = next(row for row in range(len(CAPTIONS)) if torch.equal(image, latents[row]))
            assert torch.equal(prompt, ids[row])
            drawn.add(row)
    assert drawn == set(clean)
    check_trained(pipe, run, ["*.lora_*"])


def test_too_few_clean_images_are_refused():
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(UsageError, match="3 of 6"):
        training(pipe, Config(), latents_of(pipe), CAPTIONS, CONTAINS, batch_size=BATCH)
    with pytest.raises(UsageError, match="leaves too few images"):
        training(pipe, Config(), latents_of(pipe), CAPTIONS, [True] * 6, batch_size=BATCH, minimum=0)
