# SPDX-License-Identifier: Apache-2.0
"""A misspelt name of any kind gets a suggestion, exit code 2, and nothing is written."""

from importlib import import_module
from pathlib import Path

import pytest

from anabranch import cli
from anabranch.data.images import open_images
from anabranch.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mesure"], "did you mean measure?"),
        (["erase", "scn"], "did you mean scan?"),
        (["align", "chian"], "did you mean chain?"),
        (["experts", "prun"], "did you mean prune?"),
        (["data", "icdd"], "did you mean icd?"),
        (["demo", "transferr"], "did you mean transfer?"),
        (["completion", "fsh"], "did you mean fish?"),
        (["measure", "--step=3"], "did you mean --steps?"),
        (["measure", "--no-resume"], "did you mean --resume?"),
        (["demo", "--topic", "erase"], "anabranch demo TOPIC"),
        (["erase", "train", "--lables", "x"], "did you mean --labels?"),
        (["align", "eval", "--jugde", "x"], "did you mean --judge?"),
        (["experts", "rank", "--taret", "x"], "did you mean --target?"),
        (["doctor", "--deap"], "did you mean --deep?"),
        (["pretrain", "--method", "mocee"], "did you mean moce?"),
        (["pretrain", "--method=sdrr"], "did you mean sdr?"),
        (["pretrain", "--expert-scope", "block"], "did you mean blocks?"),
        (["measure", "--budget", "equal-step"], "did you mean equal-steps?"),
        (["measure", "--objective", "simsim"], "did you mean simsiam?"),
        (["customize", "--select", "pth"], "did you mean path?"),
        (["erase", "train", "--trained", "lra"], "did you mean lora?"),
        (["align", "chat", "--show", "chian"], "did you mean chain?"),
        (["measure", "--set", "learning_rat=1"], "did you mean learning_rate?"),
        (["pretrain", "--set", "clusterer=kmean"], "did you mean kmeans?"),
        (["align", "train", "--set", "skip=pairwis"], "did you mean pairwise?"),
        (["measure", "--preset", "tinny", "--sources", "patchwork:garments", "patchwork:digits", "--tasks",
          "patchwork:garments"], "did you mean tiny?"),
        (["list", "--method", "specialize/mocee"], "did you mean specialize/moce?"),
    ],
)  # fmt: skip
def test_names_on_the_command_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("patchwork:garmnts", "did you mean garments?"),
        ("patchwrok:garments", "did you mean patchwork?"),
        ("planted:garment-0", "did you mean garments?"),
        ("corpus:fashion-mnits", "did you mean fashion-mnist?"),
    ],
)
def test_names_of_images(spec, says):
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        open_images(spec)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["measure", "--steps", "ten"], "--steps cannot be used\n  expected: a whole number\n  received: 'ten'"),
        (["measure", "--steps=1.5"], "expected: a whole number"),
        (["measure", "--set", "learning_rate=fast"], "learning_rate cannot be used\n  expected: a number"),
        (["pretrain", "--method", "transformer"], "expected: moce, mae, token-moe, sdr, simsiam, byol"),
    ],
)
def test_values_of_the_wrong_kind(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_values_that_can_be_meant_are_let_through():
    """None for a setting that may be nothing, numbers in every notation, paths of any name."""
    from anabranch.cli.flags import parse
    from anabranch.cli.measure import Flags
    from anabranch.cli.options import settle
    from anabranch.jobs.transfer.settings import MeasureSettings

    argv = ["--set", "learning_rate=1e-3", "--set", "image_size=null", "--out", "mae", "--steps", "7"]
    settings = settle(MeasureSettings, parse(Flags, argv, "measure"), argv)
    assert (settings.learning_rate, settings.image_size, str(settings.out), settings.steps) == (1e-3, None, "mae", 7)


@pytest.mark.parametrize(
    "module", ["language.folder:open_language_model", "diffusion.family:open_pipeline", "bridge:read_config"]
)
def test_names_of_model_folders(module, tmp_path):
    place, _, name = module.partition(":")
    opener = getattr(import_module(f"anabranch.models.{place}"), name)
    (tmp_path / "stable-diffusion").mkdir()
    with pytest.raises(UsageError, match=r"did you mean .*stable-diffusion"):
        opener(tmp_path / "stable-difusion")
    with pytest.raises(UsageError) as refused:
        opener(tmp_path / "something-else")
    assert "did you mean" not in str(refused.value)


def test_shipped_images_where_only_folders_are_read_say_so():
    from anabranch.data.folders import refuse_missing

    with pytest.raises(UsageError, match="only folders can be read here"):
        refuse_missing(Path("patchwork:garments"))
