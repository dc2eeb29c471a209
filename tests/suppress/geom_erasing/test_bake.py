import pytest
import torch

from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.geom_erasing.adapter import hashes
from anabranch.suppress.geom_erasing.bake import Baking, BakingBatches
from anabranch.suppress.guidance import Negative, family, first_noise, sample
from anabranch.suppress.lora import add_lora
from anabranch.train.loop import TrainConfig, train
from tests.diffusion_pipelines import tiny

PROMPTS = ["a dress", "a bag"]


def baking(name="stable_diffusion_3", **given):
    student, teacher = tiny(name), tiny(name)
    given = {"eta": 1.0, "keep_coef": 1.0} | given
    prompts = [encode_prompts(teacher, texts) for texts in (PROMPTS, ["mark"] * 2, [""])]
    return Baking(student, teacher, add_lora(student, 4, 0), *prompts, **given), student, teacher


def stream(teacher, count=8):
    noise = first_noise(teacher, range(count))
    return BakingBatches(noise, torch.arange(count) % 2, 4, seed=0)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_the_loss_is_the_distance_to_the_target_written_out(name):
    objective, student, teacher = baking(name, eta=0.7, keep_coef=0.5)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = stream(teacher).batch(0)
    outputs = objective(batch)
    noised = noising(teacher.scheduler).noise(batch["latents"], batch["noise"], batch["u"])
    away, keep = 0.0, 0.0
    for row, number in enumerate(batch["prompt"].tolist()):
        z, t = noised.latents[row, None], noised.timestep[row, None]

        def ask(pipe, text, z=z, t=t):
            return family(pipe).predict(pipe, z, t, encode_prompts(pipe, [text]))

        with torch.no_grad():
            empty = ask(teacher, "")
            target = ask(teacher, PROMPTS[number]) - 0.7 * (ask(teacher, "mark") - empty)
            away += ((ask(student, PROMPTS[number]) - target) ** 2).mean().item() / 4
            keep += ((ask(student, "") - empty) ** 2).mean().item() / 4
    assert outputs["away"].item() == pytest.approx(away, rel=1e-3)
    assert outputs["keep"].item() == pytest.approx(keep, rel=1e-3)
    assert outputs["loss"].item() == pytest.approx(away + 0.5 * keep, rel=1e-3)


def test_a_perfect_student_guided_from_nothing_is_the_teacher_guided_from_the_negative():
    """eta = (s - 1) / s makes s (y' - 0) + 0 equal to n + s (y - n) when y' is the target."""
    y, n, nothing, s = torch.randn(5), torch.randn(5), torch.randn(5), 3.0
    baked = y - (s - 1) / s * (n - nothing)
    rule = Negative(positive=None, negative=None, scale=s)
    assert torch.allclose(rule.combine([nothing, baked], 0), rule.combine([n, y], 0), atol=1e-5)


def test_training_brings_the_student_to_the_guided_teacher_and_touches_its_lora_alone():
    objective, student, teacher = baking()
    before, teacher_before = hashes(student), hashes(teacher)
    config = TrainConfig(steps=60, batch_size=4, learning_rate=2e-2, weight_decay=0.0)
    losses = train(objective, stream(teacher), config).losses
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    changed = {name for name, value in hashes(student).items() if before[name] != value}
    assert changed
    assert all("lora_" in name for name in changed)
    assert hashes(teacher) == teacher_before


def test_a_student_that_learned_nothing_samples_like_the_model():
    _, student, teacher = baking()
    prompts = encode_prompts(teacher, PROMPTS)
    empty = encode_prompts(teacher, ["", ""])
    rule = Negative(positive=prompts, negative=empty, scale=2.0)
    noise = first_noise(teacher, [1, 2])
    assert torch.allclose(sample(student, rule, noise, 3), sample(teacher, rule, noise, 3), atol=1e-5)
