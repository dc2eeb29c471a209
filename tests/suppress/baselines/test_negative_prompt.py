import pytest
import torch

from anabranch.errors import UsageError
from anabranch.suppress.baselines.negative_prompt import guidance, prompts
from anabranch.suppress.guidance import first_noise, pictures
from tests.diffusion_pipelines import CALL, tiny
from tests.suppress.baselines.trained import digests

CAPTIONS, SEEDS, STEPS = ["a photo of dress", "a bag"], [3, 11], 3


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_it_is_the_stock_pipelines_negative_prompt_and_touches_nothing(name):
    pipe = tiny(name)
    before = digests(pipe)
    ours = pictures(pipe, guidance(pipe, CAPTIONS, "mark", 3.0), first_noise(pipe, SEEDS), STEPS)
    stock = pipe(
        prompt=CAPTIONS, negative_prompt=prompts("mark", 2), guidance_scale=3.0, num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="np", **CALL.get(name, {}),
    ).images  # fmt: skip
    assert torch.equal(ours, (torch.from_numpy(stock) * 255).round().to(torch.uint8).permute(0, 3, 1, 2))
    assert digests(pipe) == before


def test_without_guidance_or_without_a_word_it_is_refused():
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(UsageError, match="does nothing without guidance"):
        guidance(pipe, CAPTIONS, "mark", 1.0)
    with pytest.raises(ValueError, match="word: expected the concept's name, received ' '"):
        prompts(" ", 2)
    assert prompts("mark", 3) == ["mark", "mark", "mark"]
