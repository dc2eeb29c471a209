# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of docs/scaling.md against models that are built, and against sums by hand."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from anabranch.models import vit_mae
from anabranch.specialize import moce
from anabranch.train.sharded import units
from benchmarks import scaling_plan as plan
from tests.docs.test_pages import parsed

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


@pytest.mark.parametrize("experts", [0, 3])
def test_parameters_of_an_autoencoder_are_those_of_the_model(experts):
    model = vit_mae.build("small", image_size=32, channels=3, seed=0)
    if experts:
        config = moce.Config(num_experts=experts, assignment="gate")
        centroids = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
        moce.insert(model, centroids, torch.arange(6) % experts, config, torch.Generator().manual_seed(0))
    shape = plan.vit_mae(
        width=192, depth=6, decoder=96, decoder_depth=2, patch=4, channels=3, tokens=65, experts=experts,
        expert_layers=2 if experts else 0,
    )  # fmt: skip
    assert shape.total == sum(p.numel() for p in model.parameters())
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units(model)]
    assert shape.units == sum(sizes)
    assert shape.unit == max(sizes)
    banks = [layer.bank for layer in moce.mixtures(model).values()]
    assert shape.experts == sum(p.numel() for bank in banks for p in bank.parameters())


def test_parameters_of_a_mixture_of_language_are_those_of_its_layers():
    def gated(width, hidden):
        return [nn.Linear(width, hidden, bias=False) for _ in range(2)] + [nn.Linear(hidden, width, bias=False)]

    def block(*networks):
        attention = [nn.Linear(8, 8, bias=False) for _ in range(4)]
        return [*attention, nn.RMSNorm(8), nn.RMSNorm(8), *(layer for network in networks for layer in network)]

    dense = block(gated(8, 20))
    sparse = block(*(gated(8, 6) for _ in range(4 + 1)), [nn.Linear(8, 4, bias=False)])
    rest = [nn.Embedding(30, 8), nn.RMSNorm(8), nn.Linear(8, 30, bias=False)]

    def count(layers):
        return sum(p.numel() for layer in layers for p in layer.parameters())

    shape = plan.language_mixture(
        width=8, depth=3, dense_hidden=20, experts=4, shared=1, expert_hidden=6, chosen=2, vocabulary=30
    )
    assert shape.total == count(dense) + 2 * count(sparse) + count(rest)
    assert shape.unit == max(count(sparse), count(dense))
    assert shape.experts == 2 * 4 * 3 * 8 * 6


def test_memory_and_traffic_by_hand():
    """1,000 parameters in units of 300 and 500, a rest of 200; 400 of routed experts in one layer; four processes."""
    shape = plan.Shape(unit=500, units=800, rest=200, experts=400, layers=1, width=10, chosen=2)
    assert plan.copies(shape, 4) == plan.Need(held=16_000, at_work=0, sent=6_000)
    assert plan.sharded(shape, 4) == plan.Need(held=4_000, at_work=7_600, sent=0.75 * 4 * (2_400 + 400))
    # 600 common ones and 100 of experts; rows: 4 ways x 5 rows x 2 chosen x 10 wide x 4 bytes, three quarters of them
    assert plan.expert_parallel(shape, 4, rows=5) == plan.Need(held=11_200, at_work=0, sent=3_600 + 1_200)
    assert plan.copies(shape, 1).sent == plan.sharded(shape, 1).sent == plan.expert_parallel(shape, 1, 5).sent == 0


def test_the_page_shows_what_the_arithmetic_gives(capsys):
    plan.main()
    said = capsys.readouterr().out
    shown = re.search(r"```text\n(ViT-B/16 autoencoder.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert [line.rstrip() for line in shown[1].splitlines()] == [line.rstrip() for line in said.splitlines()]


def test_the_commands_of_the_page_have_the_options_that_they_are_shown_with():
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^(?:torchrun|accelerate launch) .*?-m (anabranch .*)$", text, re.MULTILINE)
    assert len(shown) == 4
    for line in shown:
        parsed(line)
