# SPDX-License-Identifier: Apache-2.0
"""Several processes that each keep a part of the model do what one does, and go on in any number."""

import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from anabranch.errors import AnabranchError, Stopped, UsageError
from anabranch.train import publish, sharded_checkpoint
from anabranch.train.checkpoint import Checkpoint, checkpoint_steps, load_checkpoint
from anabranch.train.loop import TrainConfig, train
from tests.many import load, read_all, run_many

HERE = Path(__file__).parent
WORKER = HERE / "sharded_worker.py"
FAST = ("moce", "token-moe", "byol", "sdr")
SLOW = ("mae", "blocks", "simsiam", "align", "step-mean", "erase")
LONG = {
    "steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 5, "log_every": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks():
    return load(HERE / "sharded_tasks.py")


@pytest.fixture
def make_tiny(tiny):
    return lambda: (tiny.TinyObjective(dropout=0.0, batch_norm=False), tiny.TinyStream())


@pytest.fixture(scope="module")
def whole(tiny):
    """Losses and parameters of one process."""
    objective = tiny.TinyObjective(dropout=0.0, batch_norm=False)
    return train(objective, tiny.TinyStream(), TrainConfig(**LONG)).losses, objective.state_dict()


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs that were stopped after step 6 in one, two and four processes; each was resumed by the others."""
    folder = tmp_path_factory.mktemp("sharded")

    def stop(step, logs):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    objective = tiny.TinyObjective(dropout=0.0, batch_norm=False)
    with pytest.raises(Stopped):
        train(objective, tiny.TinyStream(), TrainConfig(**LONG), folder / "from-1", on_step=stop)
    found = {}
    for world, resumed in ((2, ["1-in-2"]), (4, ["1-in-4", "2-in-4"])):
        for name in resumed:
            shutil.copytree(folder / f"from-{name[0]}", folder / name)
        codes, said = run_many(world, WORKER, "life", folder, *resumed)
        assert codes == [0] * world, said
        found[world] = read_all(folder, "life", world)
    return folder, found


def resume(run, make, **more):
    objective, stream = make()
    lines = []
    losses = train(objective, stream, TrainConfig(**LONG, **more), run, resume=True, report=lines.append).losses
    return losses, lines, objective.state_dict()


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"rows_seen"}:  # each process sees its own rows
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0, msg=name)


# a run's life


@pytest.mark.parametrize("world", [2, 4])
def test_a_signal_to_one_process_stops_all_with_one_checkpoint(runs, world):
    folder, found = runs
    assert [rank["stopped"][0] for rank in found[world]] == [75] * world
    assert all("after step 6 of 12" in rank["stopped"][1] for rank in found[world])
    assert len({rank["stopped"][2] for rank in found[world]}) == 1  # each has the whole model again
    assert checkpoint_steps(folder / f"from-{world}") == [5, 6]
    names = {file.name for file in (folder / f"from-{world}" / "checkpoints" / "step-000006").iterdir()}
    shards = {f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors" for rank in range(world)}
    assert names == shards | {"state.json", "manifest.json"}


@pytest.mark.parametrize("world", [2, 4])
def test_a_bad_row_in_one_process_is_refused_by_all_before_the_update(runs, world):
    for message, finite in (rank["refused"] for rank in runs[1][world]):
        assert "step 2: the loss or its gradient is not finite" in message
        assert "the batch entry 'x'" in message
        assert finite


@pytest.mark.parametrize("world", [2, 4])
def test_what_one_process_cannot_save_or_load_is_an_error_in_all_and_costs_no_earlier_checkpoint(runs, world):
    first, *others = (rank["failed"] for rank in runs[1][world])
    for rank in (first, *others):
        assert "No space left on device" in rank["part"]
        assert f"shard-{world:05d}-model-00001-of-00001.safetensors could not be read again" in rank["digest"]
        assert rank["names"] == ["step-000001"], "neither a torn one nor what it was written into"
    assert "could not write" in first["folder"]
    assert "state.json" in first["nothing left"]
    for rank in others:
        assert "the first process could not write" in rank["folder"]
        assert "the first process says why" in rank["nothing left"]


def rows_of(size, world, rank):
    """Rows of a tensor that a process has: all have as many as the first, until there are none left."""
    each = math.ceil(size / world)
    return max(0, min(each, size - rank * each))


@pytest.mark.parametrize("world", [2, 4])
def test_what_a_process_holds_by_hand(runs, make_tiny, world):
    """4 bytes a number: (rows of the process) x (numbers of a row) for each parameter, gradient, and both moments."""
    parameters = dict(make_tiny()[0].named_parameters())
    for rank, found in enumerate(runs[1][world]):
        held = {n: 4 * rows_of(len(p), world, rank) * p[0].numel() for n, p in parameters.items()}
        learned = {n: size for n, size in held.items() if not n.startswith(("unused", "frozen"))}
        assert found["held"]["parameters"] == sum(held.values())
        assert found["held"]["gradients"] == sum(learned.values())
        assert found["held"]["moments"] == 2 * sum(learned.values())
        assert found["held"]["afterwards"] == sum(p.nbytes for p in parameters.values())
    everything = sum(rank["held"]["parameters"] for rank in runs[1][world])
    assert everything == sum(p.nbytes for p in parameters.values())


# other numbers of processes


@pytest.mark.row("R12")
@pytest.mark.parametrize(("world", "name"), [(2, "1-in-2"), (4, "1-in-4"), (4, "2-in-4")])
def test_more_processes_resume_what_fewer_began(runs, whole, world, name):
    for rank, found in enumerate(runs[1][world]):
        assert found["resumed"][name]["losses"] == pytest.approx(whole[0][6:], abs=1e-5)
        assert found["resumed"][name]["lines"][:1] == (["resumed from step-000006"] if rank == 0 else [])
    assert_close(load_checkpoint(runs[0] / name).checkpoint.model, whole[1])


@pytest.mark.row("R12")
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_one_process_resumes_what_several_began(runs, whole, make_tiny, tmp_path, world, sharding):
    shutil.copytree(runs[0] / f"from-{world}", tmp_path / "run")
    losses, lines, state = resume(tmp_path / "run", make_tiny, sharding=sharding)
    assert lines[0] == "resumed from step-000006"
    assert losses == pytest.approx(whole[0][6:], abs=1e-5)
    assert_close(state, whole[1])


@pytest.mark.slow
@pytest.mark.row("R12", cheap=True)
def test_two_processes_resume_what_four_began(runs, whole, tmp_path):
    shutil.copytree(runs[0] / "from-4", tmp_path / "4-in-2")
    codes, said = run_many(2, WORKER, "life", tmp_path, "4-in-2")
    assert codes == [0, 0], said
    for rank in read_all(tmp_path, "life", 2):
        assert rank["resumed"]["4-in-2"]["losses"] == pytest.approx(whole[0][6:], abs=1e-5)


@pytest.mark.row("R12")
def test_a_part_of_another_step_would_show_and_a_missing_one_is_refused(runs, whole, make_tiny, tmp_path, counted):
    """The control: the manifest is written anew, as where nothing compares what is there with what was saved."""
    told, differs = {}, {}
    for name in ("missing", "earlier"):
        run = tmp_path / name
        shutil.copytree(runs[0] / "from-2", run)
        earlier, newest = sorted((run / "checkpoints").glob("step-*"))
        part = sorted(newest.glob("shard-*"))[-1]
        part.unlink()
        if name == "earlier":
            shutil.copy(earlier / part.name, part)
        publish._seal(newest, {})
        losses, lines, _ = resume(run, make_tiny)
        told[name], differs[name] = lines[0], losses != pytest.approx(whole[0][6:], abs=1e-5)
    assert told["missing"].startswith("skipped step-000006")
    assert told["earlier"] == "resumed from step-000006"
    counted(0, control=(int(differs["earlier"]), "of 1 that goes on with a part of another step differs"))


# rot


def newest_of(run):
    return max((run / "checkpoints").glob("step-*"))


def flip_a_bit(folder):
    file = sorted(folder.glob("shard-*"))[-1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def lose_a_shard(folder):
    sorted(folder.glob("shard-*"))[-1].unlink()


def add_a_shard(folder):
    """Its parts would be read in place of the real ones."""
    source = sorted(folder.glob("shard-*"))[0]
    shutil.copy(source, folder / "shard-00009-model-00001-of-00001.safetensors")


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, lose_a_shard, add_a_shard, lose_the_manifest])
def test_loading_walks_back_past_a_damaged_checkpoint(runs, whole, make_tiny, tmp_path, damage):
    shutil.copytree(runs[0] / "from-2", tmp_path / "run")
    damage(newest_of(tmp_path / "run"))
    losses, lines, _ = resume(tmp_path / "run", make_tiny)
    assert lines[0].startswith("skipped step-000006: ")
    assert lines[1] == "resumed from step-000005"
    assert losses == pytest.approx(whole[0][5:], abs=1e-5)


def test_parts_that_do_not_cover_a_tensor_are_refused_though_they_are_as_written(runs, make_tiny, tmp_path):
    """A checkpoint of a process that died would leave what it held as it was."""
    shutil.copytree(runs[0] / "from-2", tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name.startswith("step-"):
            sorted(folder.glob("shard-*"))[0].unlink()
            publish._seal(folder, {})
    with pytest.raises(AnabranchError, match=r"(?s)no checkpoint .* can be loaded.*the shards hold \d+ of \d+ numbers"):
        resume(tmp_path / "run", make_tiny)


def test_another_model_is_refused(runs, tiny, tmp_path):
    shutil.copytree(runs[0] / "from-2", tmp_path / "run")
    with pytest.raises(UsageError, match="another model"):
        resume(tmp_path / "run", lambda: (tiny.TinyObjective(batch_norm=True), tiny.TinyStream()))


def test_statistics_of_parameters_that_are_not_there_are_refused_and_names_that_stand_for_two(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3, 2))

    def facts(*size):
        return SimpleNamespace(size=size, properties=SimpleNamespace(dtype=torch.float64))

    for key, size in (("exp_avg/weight", (3, 2)), ("step/weight", ())):
        room = sharded_checkpoint.room_for(key, facts(*size), {"weight": weight})
        assert (room.shape, room.dtype) == (size, torch.float64)
    with pytest.raises(UsageError, match=r"optimiser knows 'bias', the model does not"):
        sharded_checkpoint.room_for("exp_avg/bias", facts(2), {"weight": weight})
    with pytest.raises(UsageError, match=r"another model(.|\n)*weight"):
        sharded_checkpoint.check_same_model({"weight": facts(3, 2)}, {"weight": torch.zeros(3, 2)}, {})
    twice = Checkpoint(step=1, model={"step/weight": weight}, optimizer={"step/weight": weight}, config={})
    with pytest.raises(AnabranchError, match="called as a statistic of another"):
        sharded_checkpoint.save_sharded(tmp_path, twice)
    assert not list(tmp_path.iterdir())


def test_a_sharded_checkpoint_holds_no_pickle(runs):
    for file in newest_of(runs[0] / "from-4").iterdir():
        if file.suffix == ".safetensors":
            load_file(file)
        else:
            json.loads(file.read_text())


# every trainer


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    world, names = request.param
    folder = tmp_path_factory.mktemp("equal")
    codes, said = run_many(world, WORKER, "equal", folder, *names, seconds=200)
    assert codes == [0] * world, said
    return folder, names, read_all(folder, "equal", world)


def test_nothing_is_connected_when_the_interpreter_ends(runs):
    """A mesh of sharded weights stays in torch's caches, and its connection with it."""
    assert [rank["connected"] for world in (2, 4) for rank in runs[1][world]] == [[]] * 6


@pytest.mark.parametrize(
    "trained",
    [(2, FAST), pytest.param((2, SLOW), marks=pytest.mark.slow), pytest.param((4, FAST), marks=pytest.mark.slow)],
    indirect=True,
    ids=["two", "two, the others", "four"],
)
def test_every_trainer_learns_what_it_learns_in_one_process(trained, tasks):
    """Of those with batch statistics: what it learns in as many processes that hold copies."""
    folder, names, ranks = trained
    for name in names:
        full = load_file(folder / f"{name}.full.safetensors")
        if name in tasks.BATCH_NORM:
            losses, expected = ranks[0][f"{name} plain"]["losses"], load_file(folder / f"{name}.none.safetensors")
        else:
            objective, stream = tasks.make(name)
            config = TrainConfig(steps=3, batch_size=8, learning_rate=1e-2, max_grad_norm=0.5)
            losses = train(objective, stream, config).losses
            expected = {key: value.detach() for key, value in objective.state_dict().items()}
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(losses, abs=1e-5), name
            assert rank[name]["as_it_came"], name
        assert_close(full, expected, atol=2e-5)
