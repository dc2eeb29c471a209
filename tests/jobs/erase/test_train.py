# SPDX-License-Identifier: Apache-2.0
"""Training an adapter: what the model is told, what a stopped run keeps, what is refused before anything is written."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anabranch.data.folders import list_folder
from anabranch.data.labels import read_labels
from anabranch.errors import AnabranchError, CheckFailed, Stopped, UsageError
from anabranch.jobs.erase import train as job
from anabranch.jobs.erase.train import erase_train
from anabranch.models.diffusion import stable_diffusion_xl
from anabranch.models.diffusion.family import open_pipeline, save_pipeline
from anabranch.models.diffusion.latents import to_latents
from tests.jobs.erase.world import CORNERS, config_of, everything, labelled, saved, train_settings
from tests.many import run_many

TOGETHER = Path(__file__).parents[1] / "together_worker.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: saved(root / name, name) for name in ("stable_diffusion", "stable_diffusion_xl")}


@pytest.fixture
def world(models, tmp_path):
    labelled(tmp_path, CORNERS)
    shutil.copytree(models["stable_diffusion"], tmp_path / "model")
    return tmp_path


# what is trained on


def test_the_size_and_the_crop_of_every_picture_reach_the_denoiser(models, tmp_path, monkeypatch):
    labelled(tmp_path, [[(0, 0, 12, 12)], None, [(40, 20, 60, 40)], None], size=(80, 40))
    seen = []
    plain = stable_diffusion_xl.predict

    def watched(pipe, latents, timestep, conditioning):
        seen.append(conditioning.time_ids.clone())
        return plain(pipe, latents, timestep, conditioning)

    monkeypatch.setattr(stable_diffusion_xl, "predict", watched)
    facts = erase_train(train_settings(tmp_path, model=models["stable_diffusion_xl"], steps=2))
    # 80 x 40 pixels become 32 x 16, of which the 16 in the middle are kept, from the eighth on
    assert {tuple(row) for row in torch.cat(seen).tolist()} == {(40, 80, 0, 8, 16, 16)}
    # the box at the left edge is cut off with the margin, and its picture is a clean one
    assert config_of(tmp_path / "adapter")["training_bins"] == [[[n, m] for m in (1, 2) for n in (1, 2)]]
    assert facts["with_concept"] == 2


def test_mirrored_pictures_have_mirrored_places(world, monkeypatch):
    latents = {}
    plain = job.prepare

    def watched(pipe, vocabulary, config, given, *rest, **more):
        latents["both"] = given
        return plain(pipe, vocabulary, config, given, *rest, **more)

    monkeypatch.setattr(job, "prepare", watched)
    erase_train(train_settings(world, flip=True))
    facts = config_of(world / "adapter")
    assert facts["training_bins"] == [[place] for place in ([0, 0], [0, 2], [2, 0], [2, 2])]
    assert facts["training_counts"] == [3, 1, 3, 1]
    plain_pixels, mirrored = latents["both"].chunk(2)
    assert not torch.equal(plain_pixels, mirrored)
    for file in world.glob("images/*/*"):  # the mirror's latents are those of a mirrored picture
        with Image.open(file) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file.with_suffix(".png"))
        if file.suffix == ".jpg":
            file.unlink()
    assert torch.allclose(encoded_again(world), mirrored, atol=1e-4)


def encoded_again(world):
    files = list_folder(world / "images").files
    order = sorted(range(len(files)), key=lambda i: files[i].rsplit("/", 1)[1])
    pixels = torch.zeros(len(files), 3, 16, 16, dtype=torch.uint8)
    job.decode_into(pixels, world / "images", [files[i] for i in order], None)
    return to_latents(open_pipeline(world / "model"), pixels)


def test_a_box_cut_off_with_the_margin_makes_its_picture_a_clean_one(world):
    row = read_labels(world / "labels.jsonl").rows[0]
    wide = dataclasses.replace(row, width=80, boxes=((0, 0, 12, 12),))
    assert job.boxes_in_square(wide, 16) is None
    assert job.boxes_in_square(dataclasses.replace(wide, boxes=()), 16) == []
    assert job.boxes_in_square(row, 16) == [pytest.approx((0, 0, 4.8, 4.8))]


# stop and go on


def test_a_stopped_run_goes_on_to_the_same_files_and_encodes_nothing_twice(world, monkeypatch):
    whole = train_settings(world, out=world / "whole", steps=6)
    erase_train(whole)
    calls = []
    plain = job.to_latents
    monkeypatch.setattr(job, "to_latents", lambda pipe, pixels: calls.append(len(pixels)) or plain(pipe, pixels))
    stopped = train_settings(world, out=world / "stopped", steps=6)
    step = job.Denoising.forward

    def third_is_the_last(self, batch):
        third_is_the_last.count += 1
        if third_is_the_last.count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    third_is_the_last.count = 0
    monkeypatch.setattr(job.Denoising, "forward", third_is_the_last)
    with pytest.raises(Stopped, match="after step 3 of 6") as error:
        erase_train(stopped)
    assert error.value.exit_code == 75
    assert not (world / "stopped" / "geom_config.json").exists()
    with pytest.raises(UsageError, match="already holds a run"):
        erase_train(stopped)
    erase_train(dataclasses.replace(stopped, resume=True))
    assert third_is_the_last.count == 6
    assert calls == [6]
    one, two = everything(world / "whole"), everything(world / "stopped")
    for file in one:
        if not file.startswith("training/"):
            assert one[file] == two[file], file


def test_a_run_stopped_while_images_are_encoded_starts_again(world, monkeypatch):
    monkeypatch.setattr(job, "CHUNK", 2)
    plain = job.to_latents

    def slow(pipe, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(pipe, pixels)

    monkeypatch.setattr(job, "to_latents", slow)
    with pytest.raises(Stopped, match="2 of 6 images encoded") as error:
        erase_train(train_settings(world))
    assert "--resume" in str(error.value)
    monkeypatch.setattr(job, "to_latents", plain)
    erase_train(train_settings(world, resume=True))
    monkeypatch.setattr(job, "CHUNK", 64)
    erase_train(train_settings(world, out=world / "whole"))
    assert (
        everything(world / "whole")["geom_tokens.safetensors"]
        == everything(world / "adapter")["geom_tokens.safetensors"]
    )


def test_a_finished_run_can_be_finished_again_and_a_torn_latents_file_is_made_anew(world):
    erase_train(train_settings(world))
    before = everything(world / "adapter")
    (world / "adapter" / "geom_config.json").unlink()
    (world / "adapter" / "training" / "latents.safetensors").write_bytes(b"torn")
    erase_train(train_settings(world, resume=True))
    after = everything(world / "adapter")
    assert before == after


def test_a_run_does_not_go_on_with_other_data(world):
    erase_train(train_settings(world))
    (world / "images" / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": str(path.relative_to(world / "images")), "text": "a coat"}) + "\n"
            for path in sorted(world.glob("images/*/*"))
        )
    )
    before = everything(world / "adapter")
    with pytest.raises(UsageError, match="captions: not what this run began with"):
        erase_train(train_settings(world, resume=True))
    with pytest.raises(UsageError, match="started with another configuration"):
        erase_train(train_settings(world, resume=True, steps=9))
    assert everything(world / "adapter") == before


# what is said but not refused


def test_what_can_be_trained_but_should_be_known_is_said_and_kept(models, tmp_path, capsys):
    labelled(tmp_path, [found or [] for found in CORNERS])
    shutil.copytree(models["stable_diffusion"], tmp_path / "model")
    erase_train(train_settings(tmp_path, alpha=float("inf")))
    warnings = config_of(tmp_path / "adapter")["warnings"]
    said = capsys.readouterr().out
    card = (tmp_path / "adapter" / "README.md").read_text()
    for part in (
        "every image contains the concept",
        "a grid of 3 x 3 does not divide latents of 8 x 8",
        "alpha is infinite",
    ):
        assert any(part in warning for warning in warnings)
        assert said.count(part) == 2, "before the training and after it"
        assert part in card
    erase_train(train_settings(tmp_path, out=tmp_path / "even", grid="2"))
    assert not any("does not divide" in warning for warning in config_of(tmp_path / "even")["warnings"])


def test_captions_that_were_cut_and_places_that_were_thinned_out_are_counted(world, models, capsys):
    erase_train(train_settings(world, grid="8", policy="name"))
    facts = config_of(world / "adapter")
    assert (facts["coarsened"], facts["captions_cut"]) == (0, 4)  # 9 bins, 1 name, 14 tokens: 4 of the 5 words remain
    labelled(world / "whole", [[(0, 0, 40, 40)], None])
    erase_train(train_settings(world / "whole", model=world / "model", grid="8", policy="sampled"))
    facts = config_of(world / "whole" / "adapter")
    assert (facts["coarsened"], facts["captions_cut"]) == (1, 1)
    assert len(facts["training_bins"][0]) == 13
    said = capsys.readouterr().out
    assert "1 images covered more bins than a prompt has room for" in said
    assert "4 captions were cut" in said


def test_places_that_nobody_knows_leave_the_name_alone(world):
    labelled(world / "nowhere", [[], None, []])
    facts = erase_train(train_settings(world / "nowhere", model=world / "model", mode="model", r=8))
    assert facts["policy"] == "name"
    with pytest.raises(UsageError, match="policy prior has no training boxes"):
        erase_train(train_settings(world / "nowhere", model=world / "model", policy="prior", out=world / "x"))
    assert not (world / "x").exists()


def test_words_that_did_not_move_are_an_error_and_words_that_moved_a_little_are_not(world):
    facts = erase_train(train_settings(world, learning_rate=1e-8, steps=1))
    assert set(facts["words_moved"].values()) == {0.0}
    with pytest.raises(CheckFailed, match="training left the new words as they were"):
        erase_train(train_settings(world, out=world / "still", learning_rate=1e-30, steps=1))


@pytest.mark.parametrize(("trained", "files"), [("denoiser", {"denoiser/config.json"}), ("tokens", set())])
def test_what_else_can_be_trained(world, trained, files):
    settings = train_settings(world, trained=trained, r=8)
    assert erase_train(settings)["trained"] == trained
    found = set(everything(world / "adapter"))
    assert files <= found
    assert "pytorch_lora_weights.safetensors" not in found


def test_words_can_be_kept_back_and_the_models_own_word_can_be_used(world):
    erase_train(train_settings(world, publish_tokens=False, out=world / "kept"))
    assert not (world / "kept" / "geom_tokens.safetensors").exists()
    assert set(load_file(world / "kept" / "negative.safetensors")) == {"name", "prior", "all"}
    erase_train(train_settings(world, concept_token="word", out=world / "word"))
    facts = config_of(world / "word")
    assert (facts["name"], facts["new_name"]) == ("mark", False)
    assert "text_encoder/<mark>" not in load_file(world / "word" / "geom_tokens.safetensors")


# what is refused


REFUSED = [
    ({"model": "modl"}, "modl is not a diffusers pipeline"),
    ({"labels": "none.jsonl"}, "none.jsonl cannot be read"),
    ({"steps": 0}, "steps: expected at least 1, received 0"),
    ({"batch_size": 0}, "batch_size: expected at least 1"),
    ({"save_every": 0}, "save_every: expected at least 1"),
    ({"seed": -1}, "seed: expected a number >= 0"),
    ({"warmup_steps": -1}, "warmup_steps: expected a number >= 0"),
    ({"max_grad_norm": 0}, "max_grad_norm: expected a number > 0"),
    ({"learning_rate": 0.0}, "learning_rate: nothing would be learned"),
    ({"learning_rate": float("nan")}, "learning_rate: nothing would be learned"),
    ({"r": 0}, "r: expected at least 1, received 0"),
    ({"alpha": -1.0}, "alpha: expected above 0"),
    ({"alpha": float("nan")}, "alpha: expected above 0"),
    ({"alpha": float("inf"), "mode": "model", "r": 8}, "alpha: expected a finite number in model removal"),
    ({"trained": "denoiser", "mode": "model"}, "trained=denoiser would change nothing"),
    ({"trained": "tokens"}, "r would change nothing"),
    ({"mode": "model"}, "r would change nothing"),
    ({"mode": "model", "r": 8, "token_rate": 2.0}, "token_rate would change nothing"),
    ({"token_rate": 0.0}, "token_rate: the new words would not learn"),
    ({"prompt_dropout": 0.6, "caption_dropout": 0.6}, "leave no row as it is"),
    ({"prompt_dropout": -0.1}, "leave no row as it is"),
    ({"grid": "3by3"}, "--grid cannot be read"),
    ({"grid": "16", "policy": "all"}, "a prompt cannot name every bin of the grid"),
    ({"concept": "l 0 0"}, "'<l_0_0>' is the word of a place already"),
    ({"concept": "a b c d e f g h i j k l m n", "concept_token": "word"}, "do not fit into a prompt"),
    ({"caption": "a {clas}"}, "the caption cannot be filled in"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_wrong_settings_say_four_facts_and_leave_no_folder(world, changes, says):
    given = {name: world / value if name in ("model", "labels") else value for name, value in changes.items()}
    with pytest.raises(UsageError) as error:
        erase_train(train_settings(world, **given))
    said = str(error.value)
    assert says in said
    assert "expected" in said
    assert "received" in said
    assert not (world / "adapter").exists()


def change_label(world, **changes):
    lines = (world / "labels.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | changes
    (world / "labels.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"boxes": [[0, 0, 50, 12]]}, "line 1: a box outside the image"),
        ({"boxes": [[0, 0, float("nan"), 12]]}, "line 1: a box is not four finite numbers"),
        ({"boxes": [[5, 5, 5, 12]]}, "an empty or reversed box"),
        ({"boxes": [[30, 30, 10, 10]]}, "this looks like xywh"),
        ({"boxes": [[1, 2, 3]]}, "a box is not four finite numbers"),
        ({"width": 41}, "is 40 x 40 pixels, the label says 41 x 40"),
        ({"file": "dress/none.png"}, "'dress/none.png' is missing"),
        ({"file": "../secret.png"}, "unsafe file name"),
        ({"sha256": "0" * 64}, "1 images changed since they were scanned"),
        ({"has_concept": "yes"}, "not a label"),
    ],
)
def test_labels_that_cannot_be_right(world, changes, says):
    change_label(world, **changes)
    with pytest.raises(AnabranchError, match=says):
        erase_train(train_settings(world))
    assert not (world / "adapter").exists()


def test_a_folder_that_has_moved(world):
    (world / "images").rename(world / "moved")
    with pytest.raises(UsageError, match="the folder of its images is gone") as error:
        erase_train(train_settings(world))
    assert "images" in str(error.value)
    erase_train(train_settings(world, images=world / "moved"))


def test_an_image_that_cannot_be_read_stops_before_training(world):
    broken = next(world.glob("images/*/01.png"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    with pytest.raises(AnabranchError, match="images changed since they were scanned"):
        erase_train(train_settings(world))
    assert not (world / "adapter" / "geom_config.json").exists()


def test_nothing_to_erase_and_no_name_for_it(world):
    labelled(world / "clean", [None, None])
    with pytest.raises(UsageError, match="there is nothing to erase"):
        erase_train(train_settings(world / "clean", model=world / "model"))
    labelled(world / "nameless", CORNERS, concept="")
    with pytest.raises(UsageError, match="the concept has no name"):
        erase_train(train_settings(world / "nameless", model=world / "model", concept=" "))
    assert not (world / "clean" / "adapter").exists()
    assert not (world / "nameless" / "adapter").exists()


def test_captions_of_some_images(world):
    next(world.glob("images/*/00.*")).with_suffix(".txt").write_text("a dress")
    with pytest.raises(UsageError, match="5 of 6 images have no caption"):
        erase_train(train_settings(world))
    assert not (world / "adapter").exists()


@pytest.mark.parametrize("detector", ["qr", "text", "read-text"])
def test_text_and_codes_are_not_mirrored(world, detector):
    labelled(world / "codes", CORNERS, detector=detector)
    with pytest.raises(UsageError, match="another thing in a mirror") as error:
        erase_train(train_settings(world / "codes", model=world / "model", flip=True))
    assert f"labels of {detector}" in str(error.value)


def test_a_word_that_the_model_knows(world):
    pipe = open_pipeline(world / "model")
    pipe.tokenizer.add_tokens(["<mark>"])
    save_pipeline(pipe, world / "knows")
    with pytest.raises(UsageError, match="'<mark>' is already in the vocabulary of text_encoder") as error:
        erase_train(train_settings(world, model=world / "knows"))
    assert "another --concept" in str(error.value)
    assert not (world / "adapter").exists()


def test_models_that_are_none(world):
    (world / "empty").mkdir()
    with pytest.raises(UsageError, match="a folder without it"):
        erase_train(train_settings(world, model=world / "empty"))
    (world / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UsageError, match="FluxPipeline: this kind of pipeline is not supported"):
        erase_train(train_settings(world, model=world / "empty"))
    shutil.copytree(world / "model", world / "euler")
    scheduler = world / "euler" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "other"}))
    with pytest.raises(UsageError, match="cannot be trained for"):
        erase_train(train_settings(world, model=world / "euler"))
    weights = next((world / "model" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="model cannot be opened") as error:
        erase_train(train_settings(world))
    assert "copy it again" in str(error.value)
    shutil.rmtree(world / "model" / "tokenizer")
    with pytest.raises(UsageError, match="model cannot be opened"):
        erase_train(train_settings(world))
    (world / "model" / "model_index.json").write_text("{")
    with pytest.raises(UsageError, match=r"model_index.json cannot be read\n  expected: JSON"):
        erase_train(train_settings(world))
    assert not (world / "adapter").exists()


def test_labels_that_are_none(world):
    (world / "labels.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(AnabranchError, match=r"labels.jsonl, line 1: not a label\n  expected: file"):
        erase_train(train_settings(world))
    (world / "labels.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no images"):
        erase_train(train_settings(world))
    (world / "labels.json").unlink()
    with pytest.raises(UsageError, match="cannot be trusted"):
        erase_train(train_settings(world))
    assert not (world / "adapter").exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(world):
    (world / "adapter").mkdir()
    (world / "adapter" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is not a run"):
        erase_train(train_settings(world))
    assert everything(world / "adapter") == {"thesis.tex": b"mine"}


# two processes


@pytest.mark.slow
def test_two_processes_hand_over_one_adapter_and_bake_one_lora(world):
    """The whole commands: what is drawn, encoded and written is so once."""
    settings = ["--model", world / "model", "--set", "batch_size=4", "--set", "r=2"]
    train = ["erase", "train", *settings, "--labels", world / "labels.jsonl", "--grid", "3", "--steps", "3",
             "--out", world / "adapter"]  # fmt: skip
    (world / "prompts.txt").write_text("a dress\na bag\n")
    bake = ["erase", "bake", *settings, "--adapter", world / "adapter", "--prompts", world / "prompts.txt",
            "--steps", "3", "--set", "sample_steps=2", "--set", "num_latents=4", "--out", world / "baked"]  # fmt: skip
    for command, out in ((train, "adapter"), (bake, "baked")):
        codes, said = run_many(2, TOGETHER, "command", *command)
        assert codes == [0, 0], said
        assert config_of(world / out)["name"]
        assert not list((world / out).glob(".adapter"))
        assert load_file(world / out / "pytorch_lora_weights.safetensors")
