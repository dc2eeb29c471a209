import pytest
import torch

from anabranch.suppress.baselines.fine_tuning import Config
from anabranch.suppress.baselines.masked_loss import mask_weights, training
from anabranch.suppress.geom_erasing.bins import Grid
from tests.diffusion_pipelines import tiny
from tests.suppress.baselines.trained import BATCH, CAPTIONS, check_trained, latents_of

GRID = Grid(4, 4)


def boxes_of(side):
    """Top left quarter of half of the images."""
    return [[(0, 0, side / 2, side / 2)], None] * (len(CAPTIONS) // 2)


def masked(pipe, side):
    config = Config(r=2, prompt_dropout=0.0)
    return training(pipe, config, latents_of(pipe), CAPTIONS, boxes_of(side), batch_size=BATCH, size=side, grid=GRID)


def test_weights_are_zero_in_the_region_and_one_on_average():
    weights = mask_weights([[(0, 0, 8, 8)], None, [], [(0, 0, 16, 16)]], 16, GRID, (8, 8))
    assert (weights[0, :4, :4] == 0).all()
    assert weights[0, 4:].unique().item() == pytest.approx(16 / 12)
    assert weights.mean((1, 2)).tolist() == pytest.approx([1, 1, 1, 1])
    assert (weights[1:] == 1).all(), "nothing known, or nothing left"


@pytest.mark.parametrize(("name", "side"), [("stable_diffusion", 16), ("stable_diffusion_3", 28)])
def test_the_region_has_no_part_in_the_loss(name, side):
    pipe = tiny(name)
    run = masked(pipe, side)
    objective, stream = run
    batch = stream.batch(0)
    rows = torch.tensor([row for row in range(BATCH) if (batch["weights"][row] == 0).any()])
    assert len(rows)
    batch = {key: tensor[rows] for key, tensor in batch.items()}
    half = batch["latents"].shape[-1] // 2
    outside = {**batch, "weights": torch.ones_like(batch["weights"])}
    outside["weights"][:, :half, :half] = 0
    expected = objective(outside)["loss"].item() * 16 / 12
    assert objective(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)
    check_trained(pipe, run, ["*.lora_*"])


def test_every_image_has_an_entry():
    pipe = tiny("stable_diffusion_3")
    with pytest.raises(ValueError, match=r"boxes: expected an entry an image \(6\), received 1"):
        training(pipe, Config(), latents_of(pipe), CAPTIONS, [None], batch_size=BATCH, size=28, grid=GRID)
