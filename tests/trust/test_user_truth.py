# SPDX-License-Identifier: Apache-2.0
"""What a user is told: of targets that match nothing, of wrong inputs, of public names."""

import importlib
import pkgutil
import re

import pytest
import torch
from torch import nn

import anabranch
from anabranch import cli
from anabranch.errors import CheckFailed
from anabranch.train.touch import digest, touch_report

HELPFUL = re.compile(r"^\s*(expected|received|try): \S|[Rr]equired|Perhaps", re.MULTILINE)
"""A fact line of ours, or what the parser of the command line says of what is missing or misspelt."""
WRONG_TARGETS = [
    "decoder", "decoder.", "encoder", "encoder.weigth", "enc*der.bias2", "encoder.weight.0", "Encoder.weight", "head.",
    "head.1.weight", "*.lora_A", "lora*", "", " ", "encoder.weight ", "[e]ncoder.scale", "encoder/weight", "experts.*",
    "encoder.weight?", "head.0.biases", "nothing.*",
]  # fmt: skip
COMMANDS = ("measure", "pretrain", "customize")
NOTHING = "nowhere-at-all"


@pytest.mark.row("U1")
def test_targets_that_match_nothing_or_change_nothing_are_errors(counted):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2))})
    before = digest(model)
    with torch.no_grad():
        model["encoder"].weight.add_(1)
    after, silent = digest(model), []
    for target in [*WRONG_TARGETS, "head.*", "head.0.weight", "encoder.bias"]:
        try:
            touch_report(before, after, named=["encoder.weight", target])
            silent.append(target)
        except CheckFailed:
            pass
    assert str(touch_report(before, after, named=["encoder.weight"])).startswith("1 tensors named")
    counted(len(WRONG_TARGETS) + 3, len(silent))


def wrong_inputs():
    """Command lines with one mistake each, which are found before anything starts."""
    for command in (*COMMANDS, "erase", "align", "experts", "report", "list", "doctor", "demo"):
        yield [command[:-1]]
        yield [command[0] + command]
        yield [command, "--nonsense", "3"]
    for command in COMMANDS:
        yield [command, "--stpes", "3"]
        yield [command, "--set", "nonsense=1"]
        yield [command, "--set", "out"]
        yield [command, "--set", "=3"]
        yield [command, "--config", NOTHING]
        yield [command, "--out", "/proc/nowhere/run"]
    for name, command in (("steps", "measure"), ("seeds", "measure"), ("batch_size", "measure"), ("steps", "pretrain")):
        for value in ("fast", "[1, 2]", "{a: 1}", "2001-99-99", "[", "null", "!!python/name:os.system x"):
            yield [command, "--set", f"{name}={value}"]
    for domain in ("patchwork:garmnets", "patchwork:", "corpus:nothing", "planted:nothing", NOTHING, __file__):
        yield ["measure", "--sources", domain, domain, "--tasks", domain, "--out", "OUT"]
        yield ["pretrain", "--images", domain, "--out", "OUT"]
    for preset in ("huge", "tinny", ""):
        yield ["measure", "--sources", "patchwork:garments", "patchwork:digits", "--tasks", "patchwork:garments",
               "--preset", preset, "--out", "OUT"]  # fmt: skip
        yield ["pretrain", "--images", "patchwork:garments", "--preset", preset, "--out", "OUT"]
    for key in ("specialize/mocee", "os.system", "moce/specialize", "measure/../errors"):
        yield ["list", "--method", key]
    for run in (NOTHING, __file__):
        yield ["customize", "--run", run, "--task", "patchwork:garments", "--out", "OUT"]
        yield ["report", run]


@pytest.mark.row("U3")
def test_wrong_inputs_are_answered_with_what_to_try(tmp_path, capsys, counted):
    lines, poor = list(wrong_inputs()), []
    for line in lines:
        line = [str(tmp_path / "out") if word == "OUT" else word for word in line]
        try:
            code = cli.main(line)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        told = out + err
        if code != 2 or not HELPFUL.search(told):
            poor.append((" ".join(line), code, told[:160]))
    assert len(lines) >= 100
    assert len(poor) <= 0.05 * len(lines), poor
    counted(len(lines), len(poor))


@pytest.mark.row("U5")
def test_public_names_are_all_there(counted):
    missing, total = [], 0
    for info in pkgutil.walk_packages(anabranch.__path__, "anabranch."):
        if not info.ispkg or info.name.startswith("anabranch.data."):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", ())
        total += len(names)
        missing += [f"{info.name}.{name}" for name in names if not hasattr(module, name)]
    counted(total, len(missing))
