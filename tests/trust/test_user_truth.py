# SPDX-License-Identifier: Apache-2.0
"""What a user is told: of targets that match nothing, of wrong inputs, of public names."""

import importlib.util
import pkgutil
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import nn

import anabranch
from anabranch import cli
from anabranch.errors import AnabranchError, CheckFailed
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
    every = [*WRONG_TARGETS, "head.*", "head.0.weight", "encoder.bias"]
    filtered = [[name for name in before if fnmatchcase(name, target)] for target in every]
    passed_over = sum(all(before[name] == after[name] for name in names) for names in filtered)
    words = f"of {len(every)} change nothing where names are only filtered"
    counted(len(every), len(silent), control=(passed_over, words), least=len(every))


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


def poorly_answered(lines, out, capsys):
    poor = []
    for line in lines:
        line = [str(out) if word == "OUT" else word for word in line]
        try:
            code = cli.main(line)
        except SystemExit as stop:
            code = stop.code
        told = "".join(capsys.readouterr())
        if code != 2 or not HELPFUL.search(told):
            poor.append((" ".join(line), code, told[:160]))
    return poor


@pytest.mark.row("U3")
def test_wrong_inputs_are_answered_with_what_to_try(tmp_path, capsys, monkeypatch, counted):
    lines = list(wrong_inputs())
    poor = poorly_answered(lines, tmp_path / "out", capsys)
    assert len(lines) >= 100
    assert poor == []
    monkeypatch.setattr(AnabranchError, "__str__", lambda error: error.what)  # errors that say what, and no more
    some = lines[::4]
    bare = len(poorly_answered(some, tmp_path / "out", capsys))
    words = f"of {len(some)} are answered poorly where errors say only what is wrong"
    counted(len(lines), len(poor), control=(bare, words), least=len(some))


def public_names(package):
    """(how many, those that are not there) of the package and every module in it that names its public names."""
    missing, total = [], 0
    names = [package.__name__, *(info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
    for name in names:
        spec = importlib.util.find_spec(name)
        if name.endswith("__main__") or "__all__" not in Path(spec.origin).read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(name)
        total += len(module.__all__)
        missing += [f"{name}.{one}" for one in module.__all__ if not hasattr(module, one)]
    return total, missing


@pytest.mark.row("U5")
def test_public_names_are_all_there(tmp_path, monkeypatch, counted):
    total, missing = public_names(anabranch)
    assert total >= 60
    (tmp_path / "promising").mkdir()
    (tmp_path / "promising" / "__init__.py").write_text('here = 1\n__all__ = ["here", "gone"]\n')
    (tmp_path / "promising" / "part.py").write_text('__all__ = ["gone_too"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    planted = importlib.import_module("promising")
    seen = len(public_names(planted)[1])
    for name in [name for name in sys.modules if name.split(".")[0] == "promising"]:
        del sys.modules[name]
    words = "of 2 names that a package promises and does not have are seen"
    counted(total, len(missing), control=(seen, words), least=2)
