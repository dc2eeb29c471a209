# SPDX-License-Identifier: Apache-2.0
"""Drawing with an adapter: what changes a picture, what would change nothing, what a damaged adapter is told."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anabranch.errors import AnabranchError, UsageError
from anabranch.jobs.erase import sample as job
from anabranch.jobs.erase.sample import Sampling, bins_found, draw_with, erase_sample
from anabranch.jobs.erase.train import erase_train
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.detectors import Detection
from anabranch.suppress.geom_erasing.adapter import apply
from anabranch.suppress.geom_erasing.bins import Grid
from tests.jobs.erase.world import CORNERS, config_of, everything, labelled, sample_settings, saved, train_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and three adapters: with LoRA, of the words alone, and without its words."""
    root = tmp_path_factory.mktemp("made")
    saved(root / "model")
    labelled(root, CORNERS)
    erase_train(train_settings(root))
    erase_train(train_settings(root, mode="model", r=8, out=root / "words"))
    erase_train(train_settings(root, publish_tokens=False, out=root / "kept"))
    return root


@pytest.fixture
def world(made, tmp_path):
    """The same, to be written into."""
    for name in ("model", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def drawn(root, tmp_path, **changes):
    out = tmp_path / "drawn"
    erase_sample(sample_settings(root, out=out, **changes))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])


def test_what_changes_a_picture(made, tmp_path):
    plain = drawn(made, tmp_path)
    assert len(plain) == 2
    assert (drawn(made, tmp_path) == plain).all()
    for changes in (
        {"policy": "all"},
        {"negative": "top left"},
        {"guidance": 3.0},
        {"strength": 0.5},
        {"negative_scale": 2.0},
        {"window": (0.0, 0.5)},
        {"seed": 1},
        {"steps": 3},
        {"adapter": made / "words"},
    ):
        assert (drawn(made, tmp_path, **changes) != plain).any(), changes
    alone = drawn(made, tmp_path, batch_size=1).astype(int)
    assert abs(alone - plain).max() <= 1, "sums in another order"


def test_how_pictures_were_made_stands_beside_them(made, tmp_path):
    settings = sample_settings(made, out=tmp_path / "drawn", count=2, policy="sampled", negative="bag", seed=3)
    rows = erase_sample(settings)
    facts = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    assert {name: facts[name] for name in ("policy", "guidance", "steps", "negative", "seed")} == {
        "policy": "sampled",
        "guidance": 7.5,
        "steps": 2,
        "negative": "bag",
        "seed": 3,
    }
    assert [row["text"] for row in rows] == ["a dress"] * 2 + ["a bag"] * 2
    assert len({row["seed"] for row in rows}) == 4
    before = everything(tmp_path / "drawn")
    erase_sample(settings)
    assert everything(tmp_path / "drawn") == before


def test_a_prompt_that_is_cut_is_said(made, tmp_path, capsys):
    erase_sample(sample_settings(made, out=tmp_path / "drawn", prompt=("a dress " * 12,)))
    assert "warning: 24 tokens, of which the model reads the first 14: 'a dress a dress" in capsys.readouterr().out


class Eye:
    """Sees the concept in the first picture that it is shown, at the top left."""

    name, version, threshold = "eye", "1", 0.5
    box = (0.0, 0.0, 4.0, 4.0)

    def __init__(self):
        self.shown = 0

    def detect(self, images, files=None):
        self.shown += len(images)
        return [[Detection(0.9, self.box, "mark")] if i == 0 else [] for i in range(len(images))]


def test_only_what_the_detector_fires_on_is_drawn_again(made):
    pipe = open_pipeline(made / "model")
    applied = apply(pipe, made / "adapter")
    how, prompts, seeds = Sampling(scale=5.0, steps=2), ["a dress", "a bag"], [3, 5]
    eye = Eye()
    first = draw_with(applied, "none", prompts, seeds, how)
    found = draw_with(applied, "detected", prompts, seeds, how, detector=eye)
    assert eye.shown == 2
    assert (found[0] != first[0]).any()
    assert torch.equal(found[1], first[1])
    negative = applied.negative("detected", 1, detected=[[(0, 0)]])
    assert torch.equal(found[:1], job.draw(pipe, prompts[:1], negative, seeds[:1], how))
    eye.box = None
    with pytest.raises(UsageError, match="eye sees the concept but not where") as error:
        bins_found(first, eye, Grid(3, 3))
    assert "policy name" in str(error.value)
    with pytest.raises(UsageError, match="policy detected needs a detector"):
        draw_with(applied, "detected", prompts, seeds, how)


def test_an_adapter_without_its_words_draws_from_what_lies_ready(made, tmp_path):
    ready = drawn(made, tmp_path, adapter=made / "kept", policy="prior")
    assert (ready == drawn(made, tmp_path, policy="prior")).all()
    for changes in ({"policy": "sampled"}, {"policy": "name", "negative": "bag"}):
        with pytest.raises(UsageError, match="this adapter came without its words"):
            drawn(made, tmp_path, adapter=made / "kept", **changes)


REFUSED = [
    ({"prompt": ()}, "nothing to draw"),
    ({"count": 0}, "nothing to draw"),
    ({"steps": 0}, "steps cannot be used"),
    ({"batch_size": 0}, "batch_size cannot be used"),
    ({"guidance": float("nan")}, "guidance cannot be used"),
    ({"guidance": -1.0}, "guidance cannot be used"),
    ({"guidance": 1.0}, "a negative prompt does nothing without guidance"),
    ({"guidance": 1.0, "policy": "none", "negative": "bag"}, "a negative prompt does nothing without guidance"),
    ({"guidance": 1.0, "adapter": None, "negative": "bag"}, "a negative prompt does nothing without guidance"),
    ({"window": (0.8, 0.2)}, "window cannot be used"),
    ({"window": (0.2, 0.2)}, "window cannot be used"),
    ({"window": (-0.1, 1.0)}, "window cannot be used"),
    ({"window": (0.0, 1.5)}, "window cannot be used"),
    ({"window": (0.0, float("nan"))}, "window cannot be used"),
    ({"negative_scale": 0.0}, "negative_scale cannot be used"),
    ({"negative_scale": -1.0}, "negative_scale cannot be used"),
    ({"strength": 0.0}, "this strength would do nothing"),
    ({"strength": -1.0}, "this strength would do nothing"),
    ({"strength": float("nan")}, "this strength would do nothing"),
    ({"policy": "nmae"}, "there is no policy 'nmae'"),
    ({"policy": "detected"}, "policy detected needs a detector"),
    ({"policy": "name", "detector": "qr"}, "detector would change nothing"),
    ({"threshold": 0.5}, "threshold would change nothing"),
    ({"policy": "none", "window": (0.0, 0.5)}, "window would change nothing"),
    ({"policy": "none", "negative_scale": 2.0}, "negative_scale would change nothing"),
    ({"negative": "top left " * 7}, "the negative prompt is too long"),
    ({"adapter": None, "policy": "name"}, "policy would change nothing without an adapter"),
    ({"adapter": None, "detector": "qr"}, "detector would change nothing without an adapter"),
    ({"adapter": None, "strength": 0.5}, "strength would change nothing without an adapter"),
    ({"adapter": None, "negative_scale": 2.0}, "negative_scale would change nothing without an adapter"),
    ({"adapter": None, "threshold": 0.3}, "threshold would change nothing without an adapter"),
    ({"adapter": None, "window": (0.0, 0.5)}, "window would change nothing"),
    ({"model": "modl"}, "is not a diffusers pipeline"),
    ({"adapter": "model"}, "is not an adapter"),
    ({"adapter": "words", "strength": 0.5}, "strength would change nothing: tokens was trained"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_wrong_settings_are_refused_and_leave_no_folder(made, tmp_path, changes, says):
    given = {name: made / value if name in ("model", "adapter") and value else value for name, value in changes.items()}
    with pytest.raises(UsageError) as error:
        erase_sample(sample_settings(made, out=tmp_path / "drawn", **given))
    assert says in str(error.value)
    assert "expected: " in str(error.value) or "did you mean" in str(error.value)
    assert "try: " in str(error.value) or "received: " in str(error.value)
    assert not list(tmp_path.iterdir())


def test_guidance_is_not_asked_of_a_model_that_is_drawn_as_it_is(made, tmp_path):
    assert len(drawn(made, tmp_path, adapter=None, guidance=1.0)) == 2
    assert len(drawn(made, tmp_path, policy="none", guidance=0.0)) == 2


def test_no_folder_of_another_command_is_replaced(made, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "open_model", None)  # nothing long is started
    for name, file in (("mine", "thesis.tex"), ("icd", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"format": 1, "files": {}}')
        with pytest.raises(UsageError, match="is there already") as error:
            erase_sample(sample_settings(made, out=tmp_path / name))
        assert file in str(error.value)
        assert set(everything(tmp_path / name)) == {file}


def test_a_stranger_among_earlier_pictures_keeps_them(made, tmp_path):
    settings = sample_settings(made, out=tmp_path / "drawn")
    erase_sample(settings)
    (tmp_path / "drawn" / "notes.txt").write_text("mine")
    before = everything(tmp_path / "drawn")
    with pytest.raises(UsageError, match="holds files that would be lost"):
        erase_sample(dataclasses.replace(settings, seed=1))
    assert everything(tmp_path / "drawn") == before


# adapters that are not what they were


def test_an_adapter_of_another_model(made, tmp_path):
    saved(tmp_path / "other", seed=1)
    saved(tmp_path / "large", "stable_diffusion_xl")
    with pytest.raises(UsageError, match="was made for another base model") as error:
        drawn(made, tmp_path, model=tmp_path / "other")
    assert f"the model it was trained on: {made / 'model'}" in str(error.value)
    with pytest.raises(UsageError, match="was made for another kind of model"):
        drawn(made, tmp_path, model=tmp_path / "large")


def tampered(**changes):
    def change(folder):
        (folder / "geom_config.json").write_text(json.dumps(config_of(folder) | changes))

    return change


def without(*keys):
    def change(folder):
        kept = {name: value for name, value in config_of(folder).items() if name not in keys}
        (folder / "geom_config.json").write_text(json.dumps(kept))

    return change


def words_changed(change):
    def rewrite(folder):
        tensors = load_file(folder / "geom_tokens.safetensors")
        change(tensors)
        save_file(tensors, folder / "geom_tokens.safetensors")

    return rewrite


DAMAGE = [
    (lambda folder: (folder / "geom_config.json").write_text("{"), "JSONDecodeError"),
    (lambda folder: (folder / "geom_config.json").write_text("[]"), "AttributeError"),
    (lambda folder: (folder / "geom_config.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
    (tampered(format=9), "another format"),
    (tampered(grid=[2, 3]), "is in no grid|beside a grid of 2 x 3"),
    (tampered(grid=[4, 3]), "KeyError: 'text_encoder/<l_3_0>'"),
    (tampered(grid=[0, 3]), "grid: expected at least 1 x 1"),
    (tampered(grid="3x3"), "is damaged"),
    (tampered(name="<other>"), "KeyError: 'text_encoder/<other>'"),
    (tampered(trained="everything"), "trained is 'everything'"),
    (tampered(trained="denoiser"), "no denoiser/config.json"),
    (tampered(training_bins=[[[7, 7]]], training_counts=[1]), "the bin [7, 7] beside a grid of 3 x 3"),
    (tampered(training_counts=[1]), "1 counts"),
    (tampered(training_counts=["a", "b", "c"]), "some of them no counts"),
    (without("base"), "without base"),
    (without("grid"), "KeyError: 'grid'"),
    (without("concept", "family"), "without family, concept"),
    (words_changed(lambda tensors: tensors.pop("text_encoder/<l_1_1>")), "KeyError: 'text_encoder/<l_1_1>'"),
    (
        words_changed(lambda tensors: tensors.update({"text_encoder/<l_9_9>": torch.zeros(16)})),
        "'text_encoder/<l_9_9>'",
    ),
    (words_changed(lambda tensors: tensors.update({"text_encoder/<mark>": torch.zeros(8)})), "RuntimeError"),
    (words_changed(lambda tensors: [tensors.update({name: torch.zeros(8)}) for name in tensors]), "do not fit"),
    (lambda folder: (folder / "geom_tokens.safetensors").write_bytes(b"torn"), "SafetensorError"),
    (lambda folder: (folder / "negative.safetensors").unlink(), "no negative.safetensors"),
    (lambda folder: (folder / "negative.safetensors").write_bytes(b"torn"), "SafetensorError"),
    (lambda folder: save_file({"x": torch.zeros(1)}, folder / "negative.safetensors"), "without the negative prompt"),
    (lambda folder: (folder / "pytorch_lora_weights.safetensors").unlink(), "no pytorch_lora_weights.safetensors"),
    (lambda folder: (folder / "pytorch_lora_weights.safetensors").write_bytes(b"torn"), "is damaged"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE, ids=[str(i) for i in range(len(DAMAGE))])
def test_a_damaged_adapter_is_told_as_such(world, damage, says):
    damage(world / "adapter")
    with pytest.raises(AnabranchError) as error:
        erase_sample(sample_settings(world, out=world / "drawn"))
    said = str(error.value)
    assert any(part in said for part in says.split("|")), said
    assert "expected" in said
    assert "received" in said
    assert not (world / "drawn").exists()
