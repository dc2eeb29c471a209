import math

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_ids, encode_prompts
from anabranch.suppress.captioned import CaptionedBatches, captioned
from anabranch.suppress.denoising import Denoising
from anabranch.suppress.geom_erasing.adapter import hashes
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.erase import Config, check_contrast, grid_of, prepare
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.guidance import family
from anabranch.train.loop import TrainConfig, train
from tests.diffusion_pipelines import FAMILIES, tiny

WORDS = Vocabulary(name="<mark>", grid=Grid(3, 3))
BOXES = [[(0, 0, 6, 6)], None, [(10, 10, 16, 16)], [], [(0, 0, 16, 16)], None]
CAPTIONS = ["a dress"] * 6


def prepared(name, **config):
    pipe = tiny(name)
    side = family(pipe).latent_size(pipe)
    channels = 1 if name == "stable_diffusion_3" else 4
    latents = torch.randn(6, channels, side, side, generator=torch.Generator().manual_seed(0))
    return pipe, prepare(pipe, WORDS, Config(r=2, **config), latents, CAPTIONS, BOXES, size=16, word="mark")


def trained(pipe, prepared, steps=3, run=None, resume=False, **config):
    settings = {"steps": steps, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.0, "save_every": 2} | config
    objective = Denoising(pipe, prepared.parameters)
    return train(objective, CaptionedBatches(prepared.data, 4, seed=0), TrainConfig(**settings), run, resume=resume)


@pytest.mark.parametrize("name", FAMILIES)
def test_model_removal_changes_the_new_words_and_nothing_else(name):
    pipe, ready = prepared(name, mode="model")
    before = hashes(pipe)
    trained(pipe, ready)
    after = hashes(pipe)
    changed = {tensor for tensor in before if before[tensor] != after[tensor]}
    assert changed
    assert all(tensor.endswith("token_embedding.delta") for tensor in changed)
    assert len(changed) == len(ready.attached.embeddings)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_data_removal_with_lora_leaves_every_old_weight_as_it_was(name):
    pipe, ready = prepared(name)
    before = hashes(pipe)
    trained(pipe, ready)
    after = hashes(pipe)
    changed = {tensor for tensor in before if before[tensor] != after[tensor]}
    assert all("lora_" in tensor or tensor.endswith(".delta") for tensor in changed)
    assert any("lora_B" in tensor for tensor in changed)


def test_every_named_word_learns_and_words_that_no_caption_names_do_not():
    pipe, ready = prepared("stable_diffusion", mode="model")
    start = ready.attached.rows()["text_encoder"]
    one_box = ready.data.take(torch.tensor([0, 0, 0, 0]))
    train(
        Denoising(pipe, ready.parameters),
        CaptionedBatches(one_box, 4, seed=0),
        TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, weight_decay=0.0),
    )
    moved = (ready.attached.rows()["text_encoder"] != start).any(dim=1).tolist()
    named = {WORDS.words().index(word) for word in ("<mark>", "<l_0_0>", "<l_1_0>", "<l_0_1>", "<l_1_1>")}
    assert {number for number, has_moved in enumerate(moved) if has_moved} == named


def test_the_loss_is_the_weighted_sum_written_out():
    pipe, ready = prepared("stable_diffusion", alpha=3.0)
    batch = CaptionedBatches(ready.data, 4, seed=0, prompt_dropout=0, caption_dropout=0).batch(0)
    loss = Denoising(pipe, ready.parameters)(batch)["loss"].item()
    rows = CaptionedBatches(ready.data, 4, seed=0).indices.at(0).tolist()
    noised = noising(pipe.scheduler).noise(batch["latents"], batch["noise"], batch["u"])
    inside = {0: [(0, 0), (1, 0), (0, 1), (1, 1)], 2: [(1, 1), (2, 1), (1, 2), (2, 2)]}
    suffix = {0: " <mark> <l_0_0> <l_1_0> <l_0_1> <l_1_1>", 2: " <mark> <l_1_1> <l_2_1> <l_1_2> <l_2_2>", 3: " <mark>"}
    suffix[4] = " ".join(["", *WORDS.words()])
    total = 0.0
    for place, row in enumerate(rows):
        prompt = encode_prompts(pipe, ["a dress" + suffix.get(row, "")])
        output = pipe.unet(noised.latents[place, None], noised.timestep[place], prompt.embeds, return_dict=False)[0][0]
        square = (output - noised.target[place]) ** 2
        for y in range(8):
            for x in range(8):
                # a bin is 8/3 latents wide: what lies across a border is weighed by its area
                weight = ready.data.weights[row, y, x].item()
                if row in inside and (x, y) in ((0, 0), (7, 7)):
                    is_in = (x // 3, y // 3) in inside[row]
                    K = 4
                    assert weight == pytest.approx((1 if is_in else 3) * 9 / (K + 3 * (9 - K)), rel=1e-4)
                total += weight * square[:, y, x].sum().item()
    assert loss == pytest.approx(total / (len(rows) * 4 * 64), rel=1e-4)


def test_without_weights_it_is_the_plain_loss_bit_for_bit():
    pipe, ready = prepared("stable_diffusion", alpha=1.0)
    assert ready.data.weights is None
    batch = CaptionedBatches(ready.data, 4, seed=0).batch(0)
    objective = Denoising(pipe, ready.parameters)
    plain = objective(batch)["loss"]
    noised = noising(pipe.scheduler).noise(batch["latents"], batch["noise"], batch["u"])
    embeds = encode_ids(pipe, [batch["ids_0"]]).embeds
    output = pipe.unet(noised.latents, noised.timestep, embeds, return_dict=False)[0]
    assert torch.equal(plain, torch.nn.functional.mse_loss(output, noised.target))
    ones = Denoising(pipe, ready.parameters)(batch | {"weights": torch.ones(4, 8, 8)})["loss"]
    assert torch.allclose(plain, ones, rtol=1e-6)  # the weighted mean adds in another order


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    pipe, ready = prepared("stable_diffusion_3")
    trained(pipe, ready, steps=4)
    whole = hashes(pipe)
    pipe, ready = prepared("stable_diffusion_3")
    trained(pipe, ready, steps=4, run=tmp_path, resume=False)
    for step in sorted((tmp_path / "checkpoints").glob("step-*"))[1:]:
        for file in step.iterdir():
            file.unlink()
        step.rmdir()
    (tmp_path / "metrics.jsonl").write_text("")
    pipe, ready = prepared("stable_diffusion_3")
    result = trained(pipe, ready, steps=4, run=tmp_path, resume=True)
    assert len(result.losses) == 2
    assert hashes(pipe) == whole
    saved = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("model.safetensors"))
    everything = sum(p.numel() * 4 for p in pipe.transformer.parameters())
    assert saved < everything, "a checkpoint holds what is trained, not the model"


def test_dropout_leaves_whole_prompts_words_alone_or_nothing_in_their_shares():
    pipe = tiny("stable_diffusion")
    data = captioned(pipe, torch.zeros(50, 4, 8, 8), ["a dress mark"] * 50, ["mark"] * 50)
    stream = CaptionedBatches(data, 50, seed=0, prompt_dropout=0.1, caption_dropout=0.2)
    ids = torch.cat([stream.batch(step)["ids_0"] for step in range(40)])
    whole, bare, nothing = (part[0] for part in [data.ids[0][i] for i in range(3)])
    shares = [(ids == kind).all(dim=1).float().mean().item() for kind in (whole, bare, nothing)]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert torch.equal(stream.batch(7)["noise"], stream.batch(7)["noise"])


def test_nothing_to_erase_is_refused_and_nothing_clean_is_warned_about():
    with pytest.raises(UsageError, match="there is nothing to erase"):
        check_contrast([None, None])
    assert "every image contains the concept" in check_contrast([[], [(0, 0, 1, 1)]])
    assert check_contrast([[], None]) is None


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="alpha: expected above 0"):
        Config(alpha=0)
    with pytest.raises(ValueError, match="a finite number in model removal"):
        Config(mode="model", alpha=math.inf)
    assert (grid_of("8").columns, grid_of("8x6").rows) == (8, 6)
    with pytest.raises(UsageError, match="--grid cannot be read"):
        grid_of("8by6")
