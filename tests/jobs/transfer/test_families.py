# SPDX-License-Identifier: Apache-2.0
"""What the jobs share whatever learns: a learner and a bridge decide everything that is special."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from anabranch import cli
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.transfer.checks import EXPERTS_ONLY, SDR_ONLY, check_settings
from anabranch.jobs.transfer.clusters import fingerprint
from anabranch.jobs.transfer.inside import conflict
from anabranch.jobs.transfer.learners import LEARNERS, family_of, learner
from anabranch.jobs.transfer.measure import open_corpus
from anabranch.jobs.transfer.settings import MeasureSettings, PretrainSettings
from anabranch.jobs.transfer.stages import followers, learner_of, touched
from anabranch.models import vit_mae
from anabranch.train.touch import digest

PRESENT = [name for name in LEARNERS if find_spec(f"anabranch.specialize.{name}")]
RESNETS = [name for name in PRESENT if name != "mae"]
SMALL = ["--steps", "6", "--set", "batch_size=16", "--set", "image_size=32"]


class Following(nn.Module):
    """A network with running statistics and a copy that follows it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.target_net = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("table", torch.zeros(2))

    def follows(self):
        return ["target_*"]


def test_running_statistics_and_followers_may_change_and_nothing_else(generator):
    model = Following()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    before = digest(model)
    model.net(torch.randn(8, 3, generator=generator)).sum().backward()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter += 1
        model.target_net[0].weight += 1
    facts = touched(before, digest(model), trainable, followers(model))
    assert facts == {"named": 4, "changed": 4, "untouched": []}
    model.table += 1
    with pytest.raises(CheckFailed, match="not to change"):
        touched(before, digest(model), trainable, followers(model))


def test_the_fingerprint_is_that_of_the_encoder_whatever_the_decoder():
    model = vit_mae.build("tiny", image_size=28, channels=1, seed=0)
    found = fingerprint(model)
    assert found == fingerprint(vit_mae.build("tiny", image_size=28, channels=1, seed=0))
    with torch.no_grad():
        model.decoder.mask_token += 1
    assert fingerprint(model) == found
    with torch.no_grad():
        model.vit.embeddings.cls_token += 1
    assert fingerprint(model) != found


@pytest.mark.parametrize("name", PRESENT)
def test_the_conflict_is_of_the_learners_own_loss_and_moves_nothing(name):
    specs = ("patchwork:digits", "patchwork:textures")
    settings = MeasureSettings(sources=specs, tasks=specs, objective=name, batch_size=16)
    sources = [images.take(torch.arange(0, 2000, 50)) for images in open_corpus(settings).sources]
    model = family_of(name).build("tiny", image_size=28, channels=1, seed=0)
    objective = learner(name).objective(model, seed=0)
    before = digest(objective)
    found = conflict(settings, objective, sources, seed=0)
    assert digest(objective) == before
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert found.shape == (2, 2)
    assert torch.equal(found, found.T)
    assert found.abs().max() <= 1 + 1e-5
    swapped = conflict(settings, objective, [sources[1], sources[0]], seed=0)
    assert swapped.shape == (2, 2)
    assert torch.equal(conflict(settings, objective, sources, seed=0), found)


def test_two_batches_of_a_small_source_are_disjoint():
    indices = ShuffledIndices(41, 41 // 2, seed=3)
    assert not set(indices.at(0).tolist()) & set(indices.at(1).tolist())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "moce", "groups": 2}, "groups would change nothing: moce has no sub-nets"),
        ({"method": "simsiam", "kd_coef": 0.5}, "kd_coef would change nothing: simsiam has no sub-nets"),
        ({"method": "simsiam", "experts": 8}, r"experts would change nothing[\s\S]*try: --method moce"),
        ({"method": "byol", "clusters": "8"}, "byol does not divide the images"),
        ({"method": "sdr", "assignment": "gate"}, "sdr has no experts"),
        ({"method": "sdr", "base_steps": 5}, "base_steps would change nothing"),
        ({"method": "sdr", "split_ratio": 1.5}, "split_ratio is no share"),
        ({"method": "sdr", "kd_coef": -1.0}, "kd_coef is negative"),
        ({"method": "sdr", "phase_rate": 0.0}, "phase_rate leaves nothing to learn"),
        ({"method": "byol", "heads": "common"}, "heads would change nothing"),
        ({"method": "sdr", "groups": 0}, "groups is too small"),
    ],
)
def test_a_setting_of_another_method_is_refused(options, says):
    with pytest.raises(UsageError, match=says):
        check_settings(PretrainSettings(images=("patchwork:digits",), **options))


def test_every_method_takes_its_own_settings():
    for method in ("moce", "mae", "token-moe", "sdr", "simsiam", "byol"):
        check_settings(PretrainSettings(images=("patchwork:digits",), method=method))
    check_settings(PretrainSettings(images=("patchwork:digits",), method="sdr", clusters="8", groups=2, ssl="byol"))
    fields = set(PretrainSettings.__dataclass_fields__)
    assert fields >= {*EXPERTS_ONLY, *SDR_ONLY}
    assert learner_of(PretrainSettings(method="sdr", ssl="byol")) == "byol"
    assert learner_of(PretrainSettings(method="token-moe")) == "mae"


@pytest.mark.parametrize("name", RESNETS)
def test_a_plain_resnet_is_learned_resumed_gone_on_from_and_handed_over(name, folders, tmp_path, capsys):
    pool = ["pretrain", "--images", str(folders / "pool"), "--method", name]
    assert cli.main([*pool, "--out", str(tmp_path / "run"), *SMALL]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == name
    assert summary["untouched"] == []
    assert cli.main([*pool, "--out", str(tmp_path / "run"), *SMALL, "--resume"]) == 0
    base = ["--base", str(tmp_path / "run" / "model"), *SMALL[:4]]
    assert cli.main([*pool, "--out", str(tmp_path / "more"), *base]) == 0
    assert cli.main([*pool, "--out", str(tmp_path / "no"), *base, "--preset", "small"]) == 2
    task, out = str(folders / "task"), tmp_path / "model"
    assert cli.main(["customize", "--run", str(tmp_path / "run"), "--task", task, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f'AutoModel.from_pretrained("{out}")' in said
    model = vit_mae.transformers().AutoModel.from_pretrained(out).eval()
    assert type(model).__name__ == "ResNetModel"
    card = (out / "README.md").read_text()
    assert "A plain ResNet" in card
    assert "3 x 32 x 32" in card
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"] == {"height": 32, "width": 32}
    # another family's model is no base
    mae = ["pretrain", "--images", str(folders / "pool"), "--method", "mae", "--out", str(tmp_path / "mae")]
    assert cli.main([*mae, *base]) == 2
    assert "holds a resnet model" in capsys.readouterr().err


@pytest.mark.parametrize("name", RESNETS)
def test_transfer_between_sources_is_measured_with_resnets_too(name, folders, tmp_path):
    options = ["--objective", name, "--steps", "4", "--seeds", "2", "--set", "batch_size=16", "--set", "workers=1"]
    options += ["--set", "num_labels=16", "--set", "image_size=32", "--set", "probe_points=1"]
    sources = ["--sources", str(folders / "pool/stripes"), str(folders / "pool/disc")]
    arguments = ["measure", *sources, "--tasks", str(folders / "task"), "--out", str(tmp_path / "run"), *options]
    assert cli.main(arguments) == 0
    result = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert all(abs(cosine) <= 1 + 1e-5 for row in result["conflict"] for cosine in row)
    assert (tmp_path / "run" / "shared" / "seed-0" / "model.safetensors").exists()
