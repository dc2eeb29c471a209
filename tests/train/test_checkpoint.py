# SPDX-License-Identifier: Apache-2.0
import json
import random
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from anabranch.errors import AnabranchError
from anabranch.train import publish
from anabranch.train.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    require_space,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def snapshot(step):
    model = {"weight": torch.arange(12.0).reshape(3, 4) + step, "count": torch.tensor(step), "flag": torch.tensor(True)}
    moments = {"exp_avg/weight": model["weight"] / 3, "step/weight": torch.tensor(float(step))}
    return Checkpoint(step=step, model=model, optimizer=moments, config={"seed": 1}, extra={"note": [step]})


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def loads(file):
    """Whether the weights open for whoever does not compare them with the manifest."""
    try:
        return bool(load_file(file))
    except SafetensorError:
        return False


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    saved = snapshot(7)
    path = save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path)
    assert path == loaded.path == tmp_path / "checkpoints" / "step-000007"
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    for kind in ("model", "optimizer"):
        before, after = getattr(saved, kind), getattr(loaded.checkpoint, kind)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )
    assert (loaded.checkpoint.step, loaded.checkpoint.config, loaded.checkpoint.extra) == (
        7,
        {"seed": 1},
        {"note": [7]},
    )
    assert loaded.skipped == ()


def test_tied_strided_and_empty_tensors_survive(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "row": base[1], "transposed": base.T, "empty": torch.empty(0, 3)}
    save_checkpoint(tmp_path, Checkpoint(step=1, model=tensors, optimizer={}, config={}))
    loaded = load_checkpoint(tmp_path).checkpoint.model
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    with pytest.raises(AnabranchError, match=r"'router._extra_state' cannot be saved\n  expected: a tensor"):
        save_checkpoint(tmp_path, Checkpoint(step=1, model={"router._extra_state": {}}, optimizer={}, config={}))
    assert checkpoint_steps(tmp_path) == []


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in (3, 20, 100, 1_000_000):
        save_checkpoint(tmp_path, snapshot(step))
    assert checkpoint_steps(tmp_path) == [100, 1_000_000]
    with pytest.raises(ValueError, match="keep: expected at least 2"):
        save_checkpoint(tmp_path, snapshot(2_000_000), keep=1)


def test_a_damaged_newer_one_does_not_push_out_good_ones(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, snapshot(step), keep=5)
    flip_bit(tmp_path / "checkpoints" / "step-000009" / "model.safetensors", 800)
    save_checkpoint(tmp_path, snapshot(3))
    assert checkpoint_steps(tmp_path) == [2, 3, 9]
    loaded = load_checkpoint(tmp_path)
    assert loaded.checkpoint.step == 3
    assert [(skipped.path.name, skipped.reason.split(":")[0]) for skipped in loaded.skipped] == [
        ("step-000009", "model.safetensors")
    ]


@pytest.mark.parametrize(
    "flips",
    [
        pytest.param(40, marks=pytest.mark.row("R8", sample=True)),
        pytest.param(500, marks=[pytest.mark.row("R8", cheap=True), pytest.mark.slow]),
    ],
)
def test_every_flipped_bit_is_noticed_and_the_one_before_is_loaded(tmp_path, flips, counted):
    save_checkpoint(tmp_path, snapshot(1))
    newest = save_checkpoint(tmp_path, snapshot(2))
    positions, missed, loads_anyway = random.Random(3), [], 0
    for flip in range(flips):
        file = newest / FILES[flip % len(FILES)]
        position = positions.randrange(8 * file.stat().st_size)
        flip_bit(file, position)
        loaded = load_checkpoint(tmp_path)
        walked_past = loaded.checkpoint.step == 1 and [skipped.path for skipped in loaded.skipped] == [newest]
        missed += [] if walked_past else [f"{file.name}, bit {position}"]
        loads_anyway += file.name in FILES[:2] and loads(file)
        flip_bit(file, position)
    assert load_checkpoint(tmp_path).checkpoint.step == 2
    assert missed == []
    counted(flips, len(missed), control=(loads_anyway, "load without a word where nothing compares their sha-256"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_torn_checkpoint_is_walked_past(tmp_path, file, damage):
    save_checkpoint(tmp_path, snapshot(1))
    path = save_checkpoint(tmp_path, snapshot(2)) / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert load_checkpoint(tmp_path).checkpoint.step == 1


@pytest.mark.row("R9")
def test_where_none_can_be_loaded_each_reason_is_given(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2):
        shutil.rmtree(save_checkpoint(tmp_path, snapshot(step)) / "manifest.json", ignore_errors=True)
        (tmp_path / "checkpoints" / f"step-00000{step}" / "manifest.json").unlink()
    with pytest.raises(
        AnabranchError, match=r"step-000002: manifest.json: missing; step-000001: manifest.json: missing"
    ):
        load_checkpoint(tmp_path)


def as_garbage(path):
    (path / "model.safetensors").write_bytes(b"no tensors")


def as_another_format(path):
    edit(path, format=2)


def as_a_list(path):
    (path / "state.json").write_text("[]")


def without_facts(path):
    edit(path, extra=None, world_size="two")


def without_state(path):
    (path / "state.json").unlink()


def without_moments(path):
    (path / "optimizer.safetensors").unlink()


def with_shards_that_lack_a_tensor(path):
    """One that state.json names; the file holds the others."""
    (path / "optimizer.safetensors").unlink()
    (path / "model.safetensors").rename(path / "shard-00001-model-00001-of-00001.safetensors")
    names = ["count", "flag", "weight"]
    edit(path, sharded={"model": names, "optimizer": ["exp_avg/weight"]})


def edit(path, **changes):
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (as_garbage, "header"),
        (as_another_format, "format 1 expected"),
        (as_a_list, "format 1 expected"),
        (without_facts, "no usable world_size, extra"),
        (without_state, "state.json: not in the manifest"),
        (without_moments, "optimizer.safetensors: not in the manifest"),
        (with_shards_that_lack_a_tensor, "exp_avg/weight: in none of the shards"),
    ],
)
def test_a_checkpoint_that_is_as_written_and_cannot_be_used_is_walked_past(tmp_path, change, says):
    """Its manifest agrees, as where another version wrote it, or a program that was wrong."""
    save_checkpoint(tmp_path, snapshot(1))
    newest = save_checkpoint(tmp_path, snapshot(2))
    change(newest)
    publish._seal(newest, {})
    loaded = load_checkpoint(tmp_path)
    assert loaded.checkpoint.step == 1
    assert [skipped.path for skipped in loaded.skipped] == [newest]
    assert says in loaded.skipped[0].reason


@pytest.mark.row("R9")
def test_a_renamed_checkpoint_is_not_believed(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(2))
    path.rename(path.with_name("step-000005"))
    with pytest.raises(AnabranchError, match=r"says step 2, the folder says 5"):
        load_checkpoint(tmp_path)


def test_too_little_space_is_said_before_the_start(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, 1000)
    with pytest.raises(AnabranchError, match=rf"expected: at least {4 * free} bytes free \(twice a checkpoint\)"):
        require_space(tmp_path, 2 * free)
