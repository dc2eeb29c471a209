# SPDX-License-Identifier: Apache-2.0
"""Sub-nets as a person trains, stops, resumes and hands them over, on colour folders of mixed sizes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anabranch import cli
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import open_images
from anabranch.data.streams import derived_seed
from anabranch.errors import AnabranchError, Stopped, UsageError
from anabranch.jobs.transfer import pretrain_sdr, stages
from anabranch.jobs.transfer.customize import customize
from anabranch.jobs.transfer.customize_sdr import recalibrated
from anabranch.jobs.transfer.pretrain import pretrain
from anabranch.jobs.transfer.pretrain_sdr import load_subnets
from anabranch.jobs.transfer.sdr_checks import num_paths
from anabranch.jobs.transfer.settings import CustomizeSettings, PretrainSettings
from anabranch.models import resnet, vit_mae
from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.schedule import Rounds
from anabranch.train.checkpoint import checkpoint_steps, load_checkpoint

STEPS = 20
IN_DOUBLE = Path(__file__).with_name("sdr_in_double.py")

WITHOUT_US = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "anabranch":
            raise ImportError("anabranch is not to be imported here")
sys.meta_path.insert(0, Wall())
import glob
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
torch.set_num_threads(1)
pictures, *folders = sys.argv[1:]
for folder in folders:
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    files = sorted(glob.glob(pictures + "/*.png"))[:6]
    inputs = processor([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        features = model(**inputs).pooler_output.flatten(1)
    save_file({"pixels": inputs["pixel_values"], "features": features}, folder + ".safetensors")
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
    assert classifier(**inputs).logits.shape == (6, 2)
assert not any(name.startswith("anabranch") for name in sys.modules)
"""


def settings_of(folders, out, **options):
    given = {"preset": "narrow", "image_size": 28, "groups": 2, "split_stages": 2, "clusters": "4", "batch_size": 16}
    if options.get("base") is not None:
        given = {name: value for name, value in given.items() if name not in ("preset", "image_size")}
    given = {"images": (str(folders / "pool"),), "method": "sdr", "steps": STEPS, **given, **options}
    return PretrainSettings(out=out, **given)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sdr"
    pretrain(settings_of(folders, out))
    return out


def hand_over(run, task, out, **options):
    return customize(CustomizeSettings(run=run, task=str(task), out=out, **options))


def kind_of_images(folders):
    """For each image of the pool whether it shows stripes."""
    return torch.tensor(["stripes" in str(file) for file in open_images(folders / "pool").files])


# From a folder to a model --------------------------------------------------------------------------------------------


def test_what_is_handed_over_opens_without_us_and_equals_the_active_path(run, folders, tmp_path):
    said = {select: hand_over(run, folders / "task", tmp_path / select, select=select) for select in ("path", "knn")}
    arguments = [str(folders / "task/stripes"), *(str(tmp_path / select) for select in said)]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for select in said:
        theirs = load_file(tmp_path / f"{select}.safetensors")
        with torch.no_grad():
            ours = active(run, said[select])(theirs["pixels"])
        assert (ours - theirs["features"]).abs().max() <= 1e-6
        card = (tmp_path / select / "README.md").read_text()
        assert "taken out of a super-net" in card
        assert f"| milliseconds an image, where it was made | {said[select]['latency_ms']:.2f} |" in card


def active(run, said):
    """The features of the chosen model, inside the run that it came from."""
    if said["model"] == "base":
        return lambda pixels: resnet.features(resnet.load(run / "base"), pixels)
    net, path = load_subnets(run)[0], tuple(said["path"])
    return net.activate(net.paths.index(path) if path in net.paths else SHARED)


def test_a_task_of_one_kind_takes_the_subnet_of_that_kind(folders, tmp_path):
    pretrain(settings_of(folders, tmp_path / "run", split_stages=1, clusters="2"))
    stripes, labels = kind_of_images(folders), Clustering.load(tmp_path / "run/clusters").labels
    net, of_cluster = load_subnets(tmp_path / "run")
    for kind, wanted in (("stripes", stripes), ("disc", ~stripes)):
        said = hand_over(tmp_path / "run", folders / "task" / kind, tmp_path / kind)
        row = net.paths.index(tuple(said["path"]))
        assert wanted[of_cluster[labels] == row].float().mean() > 0.8
        assert said["coverage"] > 0.8
        assert said["warnings"] == []


def test_choosing_by_labels_scores_all_and_gives_a_verdict(run, folders, tmp_path):
    said = hand_over(run, folders / "task", tmp_path / "model", select="knn")
    assert [score["model"] for score in said["scores"][:2]] == ["base", "shared"]
    assert len(said["scores"]) == 2 + 4
    assert said["verdict"].startswith(("a sub-net helps", "no sub-net helps", "no preference is shown"))
    best = max(score["knn"] for score in said["scores"])
    assert next(score["knn"] for score in said["scores"] if score["model"] == said["model"]) == best


def test_labels_that_mean_nothing_show_no_preference(run, folders, tmp_path):
    files = sorted(file for kind in ("stripes", "disc") for file in (folders / "task" / kind).iterdir())
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    for name in ("one", "other"):
        (tmp_path / "task" / name).mkdir(parents=True)
    for place, i in enumerate(order):
        shutil.copy(files[i], tmp_path / "task" / ("one", "other")[place % 2] / f"{i}{files[i].suffix}")
    said = hand_over(run, tmp_path / "task", tmp_path / "model", select="knn")
    assert "a sub-net helps" not in said["verdict"]
    assert all(20 < score["knn"] < 80 for score in said["scores"])


def test_a_narrower_model_is_cheaper_and_its_statistics_are_its_own(run, folders, tmp_path):
    whole = hand_over(run, folders / "task", tmp_path / "whole")
    said = hand_over(run, folders / "task", tmp_path / "model", keep=0.5)
    assert said["full_macs"] == whole["macs"] > said["macs"]
    assert said["full_parameters"] == whole["parameters"] > said["parameters"]
    assert min(said["latency_ms"], said["full_latency_ms"], whole["latency_ms"]) > 0
    net, _ = load_subnets(run)
    row = net.paths.index(tuple(said["path"]))
    task = open_images(folders / "task", image_size=28, channels=3)
    pixels = resnet.normalise(task.store.read(torch.arange(8)))
    found = resnet.features(resnet.load(tmp_path / "model"), pixels)
    assert torch.equal(found, resnet.features(recalibrated(net.extract(row, keep=0.5), task), pixels))
    assert not torch.allclose(found, resnet.features(net.extract(row, keep=0.5), pixels), atol=1e-3)
    assert "50%" in (tmp_path / "model" / "README.md").read_text()


def test_the_page_shows_every_phase_and_what_each_subnet_learned_from(run):
    summary = json.loads((run / "summary.json").read_text())
    page = (run / "report.html").read_text()
    assert "There are 4 sub-nets" in page
    for name in ("the base", "phase 1", "phase 2"):
        assert f"Training of {name}" in page
    assert "What each sub-net learned from" in page
    assert " ".join(map(str, summary["paths"][3])) in page
    assert f"{summary['account']['images_seen_by_path'][0]:,}" in page
    assert summary["untouched"] == []


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ssl": "byol"}, {"teacher": "supernet"}], ids=["simsiam", "byol", "supernet"])
def test_stopped_in_every_phase_and_resumed_it_is_the_uninterrupted_run(run, folders, tmp_path, monkeypatch, options):
    """Phase 0 is trained here by simsiam, the others start from its base."""
    if options:
        options = {**options, "base": run / "base", "steps": 10}
    settings = settings_of(folders, tmp_path / "whole", save_every=4, **options)
    pretrain(settings)
    halved = settings_of(folders, tmp_path / "halved", save_every=4, **options)
    original = stages.train
    for phase, stop_after in (("phase-1", 3), ("phase-2", 2)):

        def interrupted(objective, stream, config, folder, *, phase=phase, stop_after=stop_after, **rest):
            def on_step(step, logs):
                if folder.name == phase and step == stop_after - 1:  # the step after a signal is the last
                    os.kill(os.getpid(), signal.SIGTERM)

            return original(objective, stream, config, folder, on_step=on_step, **rest)

        monkeypatch.setattr(stages, "train", interrupted)
        with pytest.raises(Stopped, match=f"after step {stop_after}"):
            pretrain(halved)
        assert checkpoint_steps(halved.out / phase)[-1] == stop_after
        halved = settings_of(folders, tmp_path / "halved", save_every=4, resume=True, **options)
    monkeypatch.setattr(stages, "train", original)
    pretrain(halved)
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "halved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for file in ("model/paths.json", "summary.json"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "halved" / file).read_text()


def test_a_loss_that_is_not_finite_names_the_phase_and_keeps_what_was_saved(run, folders, tmp_path):
    settings = settings_of(folders, tmp_path / "run", base=run / "base", learning_rate=1e30, save_every=1)
    with pytest.raises(AnabranchError, match=r"phase 1, step \d+: the loss or its gradient is not finite"):
        pretrain(settings)
    loaded = load_checkpoint(tmp_path / "run" / "phase-1")
    assert loaded.checkpoint.step >= 1
    assert all(tensor.isfinite().all() for tensor in loaded.checkpoint.model.values())


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"ssl": "byol"}, marks=pytest.mark.slow),
        pytest.param({"teacher": "supernet"}, marks=pytest.mark.slow),
        pytest.param({"heads": "common"}, marks=pytest.mark.slow),
    ],
    ids=["simsiam", "byol", "supernet", "common"],
)
def test_two_processes_give_the_subnets_of_one(run, folders, tmp_path, monkeypatch, options):
    """From one given base, as in phase 0 each process normalises by its own rows; in double precision."""
    settings = settings_of(folders, tmp_path / "one", base=run / "base", learning_rate=0.05, **options)
    runpy.run_path(str(IN_DOUBLE))["in_double"](monkeypatch.setattr)
    pretrain(settings)
    sent = ("groups", "split_stages", "batch_size", "learning_rate", "paths_a_step", *options)
    arguments = ["pretrain", "--method", "sdr", "--images", *settings.images, "--base", str(settings.base)]
    arguments += ["--steps", str(STEPS), "--clusters", "4", "--out", str(tmp_path / "two")]
    arguments += [part for name in sent for part in ("--set", f"{name}={getattr(settings, name)}")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(IN_DOUBLE)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert one["backbone.embedder.embedder.normalization.running_mean"].dtype == torch.float64
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-10, rtol=0)


def test_a_path_learns_now_in_one_process_now_in_the_other():
    """What the test above stands on: the first turn of a step is that of the first process."""
    rounds = Rounds(4, 2, 0.2, derived_seed("phase", 0, 2))
    turns = [rounds.at(step) for step in range(STEPS // 2)]
    assert all({step.index(row) for step in turns if row in step} == {0, 1} for row in range(4))


def test_phases_learn_at_their_share_of_the_rate(folders, tmp_path, monkeypatch):
    rates, original = [], pretrain_sdr.train_stage
    monkeypatch.setattr(pretrain_sdr, "train_stage", lambda *given: rates.append(given[-1]) or original(*given))
    pretrain(settings_of(folders, tmp_path / "run", learning_rate=0.2, phase_rate=0.25))
    assert rates == pytest.approx([0.2, 0.05, 0.05])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 4),  # 600 of 1,000 steps after phase 0: 960 turns
        ({"steps": 10_000}, 12),  # 9,600 turns
        ({"steps": 10_000, "anchor_share": 0.0}, 15),
        ({"steps": 10_000, "split_stages": 1}, 4),  # no more than there are paths
        ({"steps": 10**7}, 50),  # forty images each
    ],
)
def test_auto_gives_every_subnet_enough_turns_and_images(options, count):
    settings = PretrainSettings(images=("patchwork:digits",), method="sdr", **({"steps": 1000} | options))
    assert num_paths(settings, num_images=2000) == count


# Wrong use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clusters": "5"}, r"fewer paths than clusters[\s\S]*at most 4 clusters[\s\S]*received: 5"),
        ({"clusters": "1"}, "one sub-net is no choice"),
        ({"groups": 8, "clusters": "40"}, r"120 images cannot feed 40 sub-nets[\s\S]*--clusters 3"),
        ({"split_ratio": 0.0}, r"split_ratio=0: sub-nets need channels in common[\s\S]*received: 0"),
        ({"split_ratio": 1.0}, r"split_ratio=1: sub-nets need channels in common"),
        ({"split_ratio": 0.001}, r"of 48 in a stage[\s\S]*0.001, that is 0 of 48 in common"),
        ({"anchor_share": 1.0}, "anchor_share=1: the sub-nets would have no turn"),
        ({"base_share": 1.0}, "base_share=1: no step would be left"),
        ({"paths_a_step": 3}, r"share its batch equally[\s\S]*multiple of 3[\s\S]*16[\s\S]*try: --set batch_size=15"),
        ({"paths_a_step": 16}, r"each needs two images[\s\S]*at least 32[\s\S]*try: --set batch_size=32"),
        ({"anchor_share": 0.7}, r"no schedule gives each of 2 sub-nets[\s\S]*shared_share[\s\S]*--set paths_a_step=1"),
        ({"paths_a_step": 4}, "no schedule gives each of 2 sub-nets"),
        ({"split_stages": 5}, r"fewer stages to split[\s\S]*at most 4[\s\S]*received: 5"),
        ({"steps": 2}, r"fewer steps than phases[\s\S]*at least 2 after the 1 of phase 0"),
        ({"method": "sdrr"}, r"there is no method 'sdrr'[\s\S]*did you mean sdr\?"),
        ({"preset": "narow"}, r"there is no preset 'narow'[\s\S]*did you mean narrow\?"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_trained(folders, tmp_path, options, says):
    with pytest.raises(UsageError, match=says):
        pretrain(settings_of(folders, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_processes_share_the_turns_of_a_step(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"multiple of 3 processes[\s\S]*received: 2[\s\S]*--set paths_a_step=3"):
        pretrain(settings_of(folders, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_family_is_refused(folders, tmp_path):
    vit_mae.build("tiny", image_size=28, channels=3, seed=0).save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=r"holds a vit_mae model[\s\S]*resnet"):
        pretrain(settings_of(folders, tmp_path / "run", base=tmp_path / "base"))
    assert not (tmp_path / "run").exists()


def test_few_images_a_cluster_are_warned_of(run, folders, tmp_path, capsys):
    pretrain(settings_of(folders, tmp_path / "run", base=run / "base", steps=8))
    assert "warning: 120 images are few for 4 sub-nets; with 40 each: --clusters 3" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_keep_is_a_share(run, folders, tmp_path, keep):
    with pytest.raises(UsageError, match=r"keep is no share[\s\S]*above 0 and at most 1"):
        hand_over(run, folders / "task", tmp_path / "model", keep=keep)
    assert not (tmp_path / "model").exists()


def test_keep_is_refused_where_there_are_no_groups(run, folders, tmp_path):
    other = tmp_path / "simsiam"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps({"method": "simsiam"}))
    with pytest.raises(UsageError, match=r"keep would change nothing: a model of simsiam has no groups"):
        hand_over(other, folders / "task", tmp_path / "model", keep=0.5)


def test_one_image_cannot_give_the_statistics_of_a_narrower_model(run, folders, tmp_path):
    (tmp_path / "task").mkdir()
    shutil.copy(folders / "task/disc/1.png", tmp_path / "task")
    hand_over(run, tmp_path / "task", tmp_path / "model")
    with pytest.raises(UsageError, match=r"measured on the task[\s\S]*2 images[\s\S]*received: 1"):
        hand_over(run, tmp_path / "task", tmp_path / "narrow", keep=0.5)


@pytest.mark.parametrize(("others", "says"), [(0, "only one class, 'disc'"), (1, "'stripes' has 1")])
def test_labels_of_one_class_choose_nothing(run, folders, tmp_path, capsys, others, says):
    shutil.copytree(folders / "task/disc", tmp_path / "task" / "disc")
    for i in range(others):
        (tmp_path / "task" / "stripes").mkdir()
        shutil.copy(folders / f"task/stripes/{2 * i}.jpg", tmp_path / "task" / "stripes")
    arguments = ["customize", "--run", str(run), "--task", str(tmp_path / "task"), "--out", str(tmp_path / "model")]
    assert cli.main([*arguments, "--select", "knn"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
