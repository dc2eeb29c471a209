# SPDX-License-Identifier: Apache-2.0
"""A recipe on a model until it is taken off: the same as inside a `with`, and nothing afterwards."""

import pytest
import torch

from anabranch.errors import AnabranchError, UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.steer.attached import attach, detach
from anabranch.reuse.steer.recipe import Recipe, Step

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["empty", "promote"])
def test_on_and_off(kind):
    model = tiny("Qwen2-MoE")
    recipe = Recipe(steps=(Step(kind=kind, experts=((open_layers(model)[0].name, 1),)),))
    plain = model(IDS).logits
    with recipe.applied(open_layers(model)):
        expected = model(IDS).logits
    attach(model, recipe)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(expected, plain)
    with pytest.raises(UsageError, match="steered already"):
        attach(model, recipe)
    detach(model)
    assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(UsageError, match="not steered"):
        detach(model)


def test_strangers_and_what_never_acted_are_said():
    model = tiny("Qwen2-MoE")
    step = Step(kind="empty", experts=((open_layers(model)[0].name, 1),))
    with pytest.raises(UsageError, match="made on another model"):
        attach(model, Recipe(steps=(step,), model="another"))
    with pytest.raises(UsageError, match="no mixture layer"):
        attach(model, Recipe(steps=(Step(kind="empty", experts=(("nowhere", 0),)),)))
    attach(model, Recipe(steps=(step,), model="another"), strict=False)
    with pytest.raises(AnabranchError, match="never acted"):
        detach(model)
