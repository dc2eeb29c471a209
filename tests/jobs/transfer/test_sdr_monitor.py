# SPDX-License-Identifier: Apache-2.0
"""A sub-net whose features have shrunk to one direction is named; the spread of its embeddings looks healthy."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anabranch.data import patchwork
from anabranch.jobs.transfer.corpus import at_most
from anabranch.jobs.transfer.sdr_monitor import MOST_PATHS, look
from anabranch.models import resnet
from anabranch.specialize import simsiam


@pytest.fixture(scope="module")
def images():
    return at_most(patchwork.load("garments"), 300, seed=0)


@pytest.fixture(scope="module")
def healthy():
    return resnet.build("narrow", image_size=28, channels=1, seed=0)


@torch.no_grad()
def shrunk(model):
    """The same network with every channel of its last stage a copy of the first."""
    made = resnet.copy_of(model)
    for module in made.encoder.stages[-1].modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight[:1].expand_as(module.weight))
    return made


def subnets_of(*models):
    return SimpleNamespace(paths=[(row,) for row in range(len(models))], extract=lambda row: models[row])


def test_a_shrunk_sub_net_is_named(healthy, images, capsys):
    seen = look(subnets_of(healthy, shrunk(healthy), healthy), healthy, images, phase=2)
    assert seen["collapsed"] == [1]
    assert seen["sub_nets"][1] == 1
    assert "phase 2: 1 of 3 sub-nets" in capsys.readouterr().out


def test_healthy_sub_nets_pass_in_silence(healthy, images, capsys):
    assert look(subnets_of(healthy, healthy), healthy, images, phase=1)["collapsed"] == []
    assert capsys.readouterr().out == ""


def test_of_many_sub_nets_some_are_looked_at(healthy, images):
    seen = look(subnets_of(*[healthy] * (2 * MOST_PATHS)), healthy, images, phase=1)
    assert list(seen["sub_nets"]) == list(range(0, 2 * MOST_PATHS, 2))


def test_the_spread_does_not_see_it(healthy, images):
    """Why directions are counted: the projector's last norm makes one direction look like many."""
    views = images.store.read(torch.arange(len(images)))
    batch = {"view1": views, "view2": views, "row": torch.arange(len(views))}
    spread = [simsiam.objective(model, seed=0).train()(batch)["spread"] for model in (healthy, shrunk(healthy))]
    assert spread[1] > 0.8 * spread[0]  # an alarm on the spread would ring at a tenth
