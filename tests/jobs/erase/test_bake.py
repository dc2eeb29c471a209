# SPDX-License-Identifier: Apache-2.0
"""Baking: what a run draws and keeps, and what is refused before it starts."""

import dataclasses
import os
import shutil
import signal

import pytest

from anabranch.errors import CheckFailed, Stopped, UsageError
from anabranch.jobs.erase import bake as job
from anabranch.jobs.erase.bake import erase_bake, read_prompts
from anabranch.jobs.erase.sample import erase_sample
from tests.jobs.erase.world import (
    bake_settings,
    baked,
    config_of,
    everything,
    sample_settings,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return baked(tmp_path_factory.mktemp("made"), "a dress\n\n  a bag  \na dress\n")


def test_pictures_are_drawn_with_as_many_steps_as_were_asked_for(made, tmp_path, monkeypatch):
    seen = []
    plain = job.draw_latents

    def watched(pipe, asked, negative, seeds, how):
        seen.append((list(asked), how.steps, how.scale))
        return plain(pipe, asked, negative, seeds, how)

    monkeypatch.setattr(job, "draw_latents", watched)
    erase_bake(bake_settings(made, out=tmp_path / "baked", sample_steps=3, steps=2, guidance=4.0, num_latents=3))
    assert seen == [(["a dress", "a bag", "a dress"], 3, 4.0)]


def test_a_stopped_run_goes_on_to_the_same_files_and_draws_nothing_twice(made, tmp_path, monkeypatch):
    drawn = []
    plain, step = job.draw_latents, job.Baking.forward
    monkeypatch.setattr(job, "draw_latents", lambda *given: drawn.append(given) or plain(*given))

    def second_is_the_last(self, batch):
        second_is_the_last.count += 1
        if second_is_the_last.count == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    second_is_the_last.count = 0
    monkeypatch.setattr(job.Baking, "forward", second_is_the_last)
    settings = bake_settings(made, out=tmp_path / "baked")
    with pytest.raises(Stopped, match="after step 2 of 3") as error:
        erase_bake(settings)
    assert error.value.exit_code == 75
    assert not (tmp_path / "baked" / "geom_config.json").exists()
    erase_bake(dataclasses.replace(settings, resume=True))
    assert len(drawn) == 1
    one, two = everything(made / "baked"), everything(tmp_path / "baked")
    for file in one:
        if not file.startswith("training/"):
            assert one[file] == two[file], file


def test_a_run_does_not_go_on_with_other_prompts(made, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dress\n")
    settings = bake_settings(made, out=tmp_path / "baked", prompts=tmp_path / "prompts.txt")
    erase_bake(settings)
    before = everything(tmp_path / "baked")
    (tmp_path / "prompts.txt").write_text("a coat\n")
    with pytest.raises(UsageError, match="prompts: not what this run began with"):
        erase_bake(dataclasses.replace(settings, resume=True))
    assert everything(tmp_path / "baked") == before


def test_what_it_is_made_of_is_kept_and_it_is_used_without_a_negative(made, tmp_path):
    facts = config_of(made / "baked")
    assert (facts["trained"], facts["policy"], facts["baked_policy"], facts["concept"]) == (
        "baked",
        "none",
        "name",
        "mark",
    )
    assert facts["adapter"] == str(made / "adapter")
    settings = sample_settings(made, adapter=made / "baked", out=tmp_path / "drawn", guidance=1.0)
    assert {row["policy"] for row in erase_sample(settings)} == {"none"}
    with pytest.raises(UsageError, match="needs no negative prompt and has none"):
        erase_sample(dataclasses.replace(settings, policy="name", guidance=5.0))
    with pytest.raises(UsageError, match="is baked already"):
        erase_bake(bake_settings(made, adapter=made / "baked", out=tmp_path / "twice"))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("policy", ["sampled", "prior", "all"])
def test_every_policy_with_a_negative_can_be_baked(made, tmp_path, policy):
    assert erase_bake(bake_settings(made, out=tmp_path / "baked", policy=policy, steps=2))["baked_policy"] == policy


REFUSED = [
    ({"eta": 0.0}, "eta cannot be used"),
    ({"eta": float("inf")}, "eta cannot be used"),
    ({"eta": float("nan")}, "eta cannot be used"),
    ({"keep_coef": -1.0}, "keep_coef cannot be used"),
    ({"r": 0}, "r cannot be used"),
    ({"num_latents": 0}, "num_latents cannot be used"),
    ({"learning_rate": 0.0}, "learning_rate cannot be used"),
    ({"steps": 0}, "steps: expected at least 1"),
    ({"batch_size": 0}, "batch_size: expected at least 1"),
    ({"sample_steps": 0}, "steps cannot be used"),
    ({"guidance": float("inf")}, "guidance cannot be used"),
    ({"prompts": None}, "no prompts were given"),
    ({"prompts": "none.txt"}, "none.txt cannot be read"),
    ({"policy": "none"}, "policy none cannot be baked"),
    ({"policy": "detected"}, "policy detected cannot be baked"),
    ({"policy": "nmae"}, "there is no policy 'nmae'"),
    ({"model": "modl"}, "is not a diffusers pipeline"),
    ({"adapter": "model"}, "is not an adapter"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_wrong_settings_are_refused_and_leave_no_folder(made, tmp_path, changes, says):
    paths = ("model", "adapter", "prompts")
    given = {name: made / value if name in paths and value else value for name, value in changes.items()}
    with pytest.raises(UsageError) as error:
        erase_bake(bake_settings(made, out=tmp_path / "baked", **given))
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_prompts_are_lines_of_text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa dress\r\n\r\na bag\n")
    assert read_prompts(file) == ["a dress", "a bag"]
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(UsageError, match="cannot be read") as error:
        read_prompts(file)
    assert "UTF-8 text" in str(error.value)
    file.write_text(" \n\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(file)


def test_a_rate_at_which_nothing_is_learned_is_an_error(made, tmp_path):
    with pytest.raises(CheckFailed, match="training left the LoRA at nothing"):
        erase_bake(bake_settings(made, out=tmp_path / "baked", learning_rate=1e-300, steps=1))


def test_a_damaged_adapter_and_a_folder_of_something_else(made, tmp_path):
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UsageError, match="is damaged"):
        erase_bake(bake_settings(made, adapter=tmp_path / "adapter", out=tmp_path / "baked"))
    assert not (tmp_path / "baked").exists()
    before = everything(made / "adapter")
    with pytest.raises(UsageError, match="already holds a run"):
        erase_bake(bake_settings(made, out=made / "adapter"))
    with pytest.raises(UsageError, match="started with another configuration"):
        erase_bake(bake_settings(made, out=made / "adapter", resume=True))
    assert everything(made / "adapter") == before
